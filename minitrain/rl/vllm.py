"""Sample the responses of rounds with a vLLM server, over HTTP.

The server is a plain `vllm serve`. Requests are token ids, and so are responses, with a log-probability for each token.
Before each round, the weights are written to a folder, which the server reads (`reload_weights`).
"""

import collections
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minitrain.config.option import option
from minitrain.errors import ConfigError, RunError, short
from minitrain.inference.choice import Chooser, Request, Sample
from minitrain.io.http import HTTPError, call_json
from minitrain.model.merged import adapts_embeddings, merged_tensors
from minitrain.model.save import save_merged
from minitrain.model.vocabulary import embedding_layers

if TYPE_CHECKING:
    from minitrain.trainer import Trainer

N_REQUESTS = 64  # that a rank sends at the same time, by default
BUSY = (429, 502, 503, 504)  # answers of a server after which a request is repeated
FIRST_WAIT = 1.0  # seconds before the first repetition; each next one waits twice as long
NEUTRAL = {  # else the server takes these from the model's generation_config.json
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@dataclass
class VLLMOptions:
    """The options of `rollout.engine_args` for vLLM."""

    url: str = option("http://localhost:8000", "Address of the server.")
    weights_dir: str | None = option(
        None, "Folder for the weights, which the server reads at the same path (default: the one for temporary files)."
    )
    timeout: float = option(600.0, "Seconds after which a request fails.", gt=0)
    retries: int = option(3, "Repetitions of a request that does not reach the server.", ge=0, le=20)
    sleep: bool = option(False, "Free the server's memory during training. The server needs --enable-sleep-mode.")


class VLLMEngine:
    """Samples from a vLLM server, which rank 0 gives the weights.

    Raises:
        ConfigError: The server cannot have the weights of this model.
    """

    def __init__(self, trainer: "Trainer", options: VLLMOptions):
        self.trainer, self.options, self.server = trainer, options, Server(options, trainer.parallel.keep_alive)
        self.is_asleep = False
        model = trainer.policy.model
        if adapts_embeddings(model):
            raise ConfigError(
                "rollout.engine: vllm conflicts with an adapter of the embeddings or the LM head, which can be tied on "
                "the server. Exclude these layers, or use rollout.engine=local.",
                "conflict",
            )
        self.n_tokens = next(iter(embedding_layers(model).values())).weight.shape[0]
        self.name = trainer.parallel.run_on_rank0(self.server.model_name)

    def refresh(self, is_updated: bool) -> None:
        trainer, parallel = self.trainer, self.trainer.parallel
        parallel.set_status(f"the weights for {self.options.url}")
        if not is_updated:
            parallel.run_on_rank0(self._wake_up)
            return
        tensors = merged_tensors(trainer.policy.model, parallel.full_tensor)
        parallel.run_on_rank0(lambda: self._send(tensors), meanwhile=lambda: collections.deque(tensors, maxlen=0))

    def _send(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Write the weights, and have the server read them."""
        with tempfile.TemporaryDirectory(prefix="minitrain-weights-", dir=self.options.weights_dir) as folder:
            os.chmod(folder, 0o755)  # the server can be another user
            save_merged(self.trainer.policy.model, Path(folder), self.trainer.precision.dtype, tensors)
            self._wake_up()
            self.server.call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
        self.server.call("/reset_prefix_cache", {})  # it has keys and values of the old weights

    def _wake_up(self) -> None:
        if self.is_asleep:
            self.server.call("/wake_up", {})
            self.is_asleep = False

    def sample(
        self, requests: Sequence[Request], choose: Chooser, end_ids: Sequence[int], stop: Sequence[str] = ()
    ) -> list[list[Sample]]:
        options = {
            "model": self.name,
            "temperature": choose.temperature,
            "top_p": choose.top_p,
            "top_k": choose.top_k,
            "stop": list(stop),
            "include_stop_str_in_output": True,
            "stop_token_ids": list(end_ids),
            "ignore_eos": True,  # end_ids alone end a response
            "logprobs": 0,  # of the sampled token
            "return_token_ids": True,
        } | NEUTRAL
        n_threads = max(1, min(len(requests), self.trainer.config.rollout.num_slots or N_REQUESTS))
        with ThreadPoolExecutor(n_threads) as pool:
            return list(pool.map(lambda request: self._complete(request, options), requests))

    def _complete(self, request: Request, options: dict[str, Any]) -> list[Sample]:
        """Return the responses to one prompt."""
        n = len(request.keys) if options["temperature"] else 1  # greedy responses are equal, and vLLM samples one
        seed = int(np.random.SeedSequence(list(request.keys[0])).generate_state(1, np.uint64)[0] >> 2)
        body = {"prompt": request.prompt, "n": n, "max_tokens": request.limit, "seed": seed, **options}
        response = self.server.call("/v1/completions", body, self.trainer.keep_alive)
        try:
            choices = sorted(response["choices"], key=lambda choice: choice["index"])
            samples = [self._sample_of(choice, request, options) for choice in choices]
        except (KeyError, TypeError, AttributeError) as error:
            raise self._wrong(f"it lacks a part ({type(error).__name__}: {error})") from None
        if len(samples) != n:
            raise self._wrong(f"it has {len(samples)} responses to a prompt, not {n}")
        return samples * (len(request.keys) // n)

    def _sample_of(self, choice: dict[str, Any], request: Request, options: dict[str, Any]) -> Sample:
        ids, logps = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        reason, prompt = choice["finish_reason"], choice.get("prompt_token_ids")
        if prompt is not None and prompt != request.prompt:
            raise self._wrong("it is to other prompt ids. Serve the model with the tokenizer of training")
        if not all(type(token) is int and 0 <= token < self.n_tokens for token in ids):
            raise self._wrong(f"it has token ids outside of 0 to {self.n_tokens - 1}, or none (vLLM before 0.10.2)")
        if not 0 < len(ids) <= request.limit or len(ids) != len(logps):
            raise self._wrong(f"it has {len(ids)} tokens and {len(logps)} log-probabilities of {request.limit} tokens")
        if not all(type(logp) in (int, float) and math.isfinite(logp) and logp < 1e-3 for logp in logps):
            raise self._wrong("its log-probabilities are not numbers below 0")
        ended = reason == "stop"
        if reason not in ("stop", "length") or (
            ended and not options["stop"] and ids[-1] not in options["stop_token_ids"]
        ):
            raise self._wrong(f"it ended by {reason!r} with token {ids[-1]}")
        return Sample(ids, [float(logp) for logp in logps], ended)

    def _wrong(self, problem: str) -> RunError:
        url = f"{self.options.url}/v1/completions"
        return RunError(f"{url}: the response is invalid: {problem}. Check the server.", "process-failed")

    def rest(self) -> None:
        if self.options.sleep:
            self.trainer.parallel.run_on_rank0(self._put_to_sleep)

    def _put_to_sleep(self) -> None:
        self.server.call("/sleep?level=1", {})
        self.is_asleep = True


class Server:
    """The HTTP interface of a server. Each request ends after `timeout` seconds, and is repeated `retries` times.

    Args:
        options: The options.
        keep_alive: Called before each wait with its longest time in seconds.
    """

    def __init__(self, options: VLLMOptions, keep_alive: Callable[[float], None] = lambda seconds: None):
        self.url = options.url.rstrip("/").removesuffix("/v1")  # which is in the addresses of OpenAI's clients
        self.options, self.keep_alive = options, keep_alive
        key = os.environ.get("VLLM_API_KEY")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def model_name(self) -> str:
        """Return the name of the served model."""
        models = self.call("/v1/models")
        try:
            return models["data"][0]["id"]
        except (KeyError, TypeError, IndexError):
            message = f"{self.url}/v1/models: expected a list of models, got {short(models)!r}. Start `vllm serve`."
            raise RunError(message, "process-failed") from None

    def call(self, path: str, body: dict[str, Any] | None = None, on_wait: Callable[[], None] = lambda: None) -> Any:
        """Return the JSON that the server answers to a POST of `body`, or to a GET without it.

        Args:
            path: The route.
            body: What is sent as JSON.
            on_wait: As for `call_json`.

        Raises:
            RunError: The server cannot be reached, is too slow, or answers with an error.
        """
        for attempt in range(self.options.retries + 1):
            wait = FIRST_WAIT * 2**attempt
            self.keep_alive(self.options.timeout + wait)
            try:
                return self._call_once(self.url + path, body, on_wait)
            except _Unreached as error:
                problem = str(error)
            if attempt < self.options.retries:
                time.sleep(wait)
        raise RunError(
            f"{self.url}{path}: {problem}, after {self.options.retries + 1} attempts. Start `vllm serve`, or set "
            "rollout.engine_args.url.",
            "unreachable",
        )

    def _call_once(self, url: str, body: dict[str, Any] | None, on_wait: Callable[[], None]) -> Any:
        seconds = self.options.timeout
        try:
            return call_json(url, body, self.headers, seconds, on_wait)
        except HTTPError as error:
            if error.problem == "unreached":
                raise _Unreached(f"cannot be reached ({error.text})") from None
            if error.status in BUSY:
                raise _Unreached(f"the server answered {error.status} {error.text[:200]}") from None
            code = "process-failed"
            if error.problem == "slow":
                message = f"no answer after {seconds:g} seconds. Raise rollout.engine_args.timeout."
                code = "unreachable"
            elif error.problem == "not-json":
                message = f"the answer is not JSON, got {error.text!r}. Check rollout.engine_args.url."
            else:
                hint = "Start it with VLLM_SERVER_DEV_MODE=1." if error.status == 404 else "See its log."
                message = f"the server answered {error.status}: {error.text[:500]}. {hint}"
            raise RunError(f"{url}: {message}", code) from None


class _Unreached(Exception):
    """A request that did not reach the server, or found it busy."""
