"""Generate responses in batches with the chat template and end tokens of training."""

import contextlib
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from minitrain.config.issues import ConfigIssues, ConfigSource, check_types
from minitrain.config.option import MAX_SEED, option
from minitrain.config.sections import ModelConfig
from minitrain.data.messages import Message, Messages, parse_messages, user
from minitrain.data.template import Template
from minitrain.distributed.parallel import SingleDevice, pick_device
from minitrain.errors import ConfigError, DataError
from minitrain.io.paths import looks_local
from minitrain.model.adapter_config import CONFIG_FILE, read_config
from minitrain.model.load import DTYPES, load_merged, load_model, load_tokenizer, trained_outputs
from minitrain.model.logprobs import cpu_has_bfloat16
from minitrain.model.policy import Policy
from minitrain.model.pretrained import read_model_config
from minitrain.model.sequence_head import make_policy
from minitrain.training.step import inference

from .choice import Chooser, IsStopped, Request, Sample, stopping
from .parse import THINK, Response, ResponseParser
from .prompts import python_variables
from .resolve import find_model
from .sampler import Sampler

if TYPE_CHECKING:
    from transformers import TextStreamer


@dataclass
class Sampling:
    """How the tokens of a response are chosen.

    Attributes:
        max_new_tokens: Maximum number of tokens of a response.
        temperature: Divides the logits. 0 is greedy decoding.
        top_p: Sample from the smallest set of most likely tokens whose probabilities sum to this.
        seed: Seed for sampling.
        top_k: Sample from the k most likely tokens; 0 from all.
        stop: Strings that end a response. The response has the string at its end.
    """

    max_new_tokens: int = option(256, "", ge=1)
    temperature: float = option(0.0, "", ge=0)
    top_p: float = option(1.0, "", gt=0, le=1)
    seed: int = option(0, "", ge=0, le=MAX_SEED)
    top_k: int = option(0, "", ge=0)
    stop: list[str] = option([], "")

    def __post_init__(self):
        issues = ConfigIssues(ConfigSource("Sampling"))
        check_types(Sampling, vars(self), "", issues)
        if "" in self.stop:
            issues.add("stop", "invalid-value", "has an empty string, which ends every response. Remove it.")
        issues.raise_if_any()


class Generator:
    """A model with its tokenizer and chat template. `load_generator` and `Trainer.generator` return one.

    >>> load_generator("runs/quickstart-sft").generate(["57 + 36 ="], Sampling(max_new_tokens=8))

    Attributes:
        counts: What became of the fields of all prompts, by the keys of `minitrain.data.counts`.
    """

    def __init__(
        self, model: nn.Module, template: Template, policy: Policy | None = None, parallel: SingleDevice | None = None
    ):
        """
        Args:
            model: The model, in evaluation mode.
            template: The chat template with the tokenizer.
            policy: The policy of the model in training (default: a new one).
            parallel: The ranks that share the prompts (default: one). All must make the same calls.
        """
        self.model, self.template = model, template
        self.tokenizer, self.parser = template.tokenizer, ResponseParser(template)
        self.counts: Counter[str] = Counter()
        self.is_checked = policy is not None
        self.policy = make_policy(model) if policy is None else policy
        self.parallel = parallel or SingleDevice(torch.device("cpu"))
        # A training can have longer documents than the config of the model names, if the model can read them.
        self.n_positions = self.policy.n_positions if policy is None else policy.position_limit
        self.calls = 0

    def __repr__(self) -> str:
        return f"<Generator: {type(self.model).__name__}>"

    @functools.cached_property
    def end_ids(self) -> list[int]:
        """The tokens that end a response."""
        if not self.model.can_generate():
            raise ConfigError("the model returns scores, not text. Use `minitrain score`.", "unsupported-model")
        return self.template.end_ids()

    @functools.cached_property
    def sampler(self) -> Sampler:
        return Sampler(self.policy, self.end_ids, is_checked=self.is_checked)

    def gathered(self) -> contextlib.AbstractContextManager:
        """Return a context in which a sharded model has its full weights."""
        return self.parallel.unsharded(self.policy)

    def generate_from_ids(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        batch_size: int = 16,
        progress: bool = False,
        tools: Sequence[list[dict] | None] | None = None,
    ) -> list[Response]:
        """Return the responses to tokenized prompts, in their order.

        Args:
            prompts: Token ids of each prompt.
            sampling: Sampling options.
            batch_size: Number of responses that are generated at the same time.
            progress: Show a progress bar.
            tools: The tools of each prompt, by which a tokenizer's response template reads calls.
        """
        responses = self._generate(prompts, sampling, batch_size, progress)
        rest = tools or [None] * len(prompts)
        return [self.parser.parse(*one) for one in zip(prompts, responses, rest, strict=True)]

    def _generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        batch_size: int = 16,
        progress: bool = False,
        streamer: "TextStreamer | None" = None,
    ) -> list[list[int]]:
        """Return the token ids of the responses."""
        return [sample.ids for (sample,) in self.sample(prompts, sampling, 1, batch_size, progress, streamer)]

    def sample(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        n: int = 1,
        batch_size: int = 16,
        progress: bool = False,
        streamer: "TextStreamer | None" = None,
    ) -> list[list[Sample]]:
        """Return n responses to each tokenized prompt. Each rank generates those to a part of the prompts."""
        chooser = Chooser(sampling.temperature, sampling.top_p, sampling.top_k)
        limits = [max(1, min(sampling.max_new_tokens, self.n_positions - len(ids))) for ids in prompts]
        # The first response does not depend on n.
        keys = [[(sampling.seed, self.calls, i) + (j,) * (j > 0) for j in range(n)] for i in range(len(prompts))]
        requests = [Request(*one) for one in zip(prompts, keys, limits, strict=True)]
        self.calls += 1
        rank, world_size = self.parallel.rank, self.parallel.world_size
        mine, self.sampler.n_slots = requests[rank::world_size], batch_size
        is_stopped = stopping(self.tokenizer, sampling.stop)
        if streamer is not None:
            is_stopped = _streaming(streamer, is_stopped)
        shows = progress and rank == 0
        with (
            inference(self.policy),
            self.gathered(),
            tqdm(total=n * len(mine), unit=" prompts", disable=None if shows else True, leave=False) as bar,
        ):

            def on_step(n_ended: int) -> None:
                bar.update(n_ended)
                self.parallel.keep_alive()

            samples = self.sampler.sample(mine, chooser, is_stopped, on_step)
            self.parallel.wait_for_ranks()
        responses: list[list[Sample]] = [[]] * len(prompts)
        plain = [[vars(sample) for sample in of_prompt] for of_prompt in samples]
        for first, of_rank in enumerate(self.parallel.gather(plain)):
            responses[first::world_size] = [[Sample(**one) for one in of_prompt] for of_prompt in of_rank]
        return responses

    def generate(
        self,
        prompts: Sequence[str | Messages],
        sampling: Sampling | None = None,
        batch_size: int = 16,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Return the responses to prompts.

        Args:
            prompts: Strings, or conversations as lists of messages that end with a turn of the user or of a tool.
            sampling: Sampling options; greedy by default.
            batch_size: Number of prompts per batch.
            tools: Functions that the model may call, as in OpenAI's format.
            chat_template_kwargs: Arguments of the chat template, such as `enable_thinking`.

        Raises:
            ConfigError: An argument has the wrong type, or no effect.
            DataError: A prompt cannot be used.
        """
        return [r.text for r in self._respond(prompts, sampling, batch_size, tools, chat_template_kwargs)]

    def generate_messages(
        self,
        prompts: Sequence[str | Messages],
        sampling: Sampling | None = None,
        batch_size: int = 16,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Message]:
        """Return the responses as messages: `content`, and `reasoning_content` and `tool_calls` if they have them.

        Tool calls that cannot be read stay in the content. The arguments are those of `generate`.
        """
        return [r.message for r in self._respond(prompts, sampling, batch_size, tools, chat_template_kwargs)]

    def _respond(
        self,
        prompts: Sequence[str | Messages],
        sampling: Sampling | None,
        batch_size: int,
        tools: Sequence[Mapping[str, Any]] | None,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> list[Response]:
        variables = python_variables(self.template.renderer, tools, chat_template_kwargs)
        ids = self.encode_prompts(prompts, sampling, variables)
        tools_of_prompts = [variables.get("tools")] * len(ids)
        return self.generate_from_ids(ids, sampling or Sampling(), batch_size, tools=tools_of_prompts)

    def encode_prompts(
        self,
        prompts: Sequence[str | Messages],
        sampling: Sampling | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[list[int]]:
        """Return the token ids of each prompt. Raises ConfigError or DataError, also for a wrong `sampling`."""
        if isinstance(prompts, str):
            raise ConfigError(f"prompts: expected a list, got a string. Write [{prompts!r}].", "wrong-type")
        if not isinstance(sampling, Sampling | None):
            raise ConfigError(f"sampling: expected a Sampling, got {sampling!r}. Write Sampling(...).", "wrong-type")
        return [self.encode(_conversation(prompt, index), variables) for index, prompt in enumerate(prompts)]

    def stream(self, messages: Messages, sampling: Sampling, variables: Mapping[str, Any] | None = None) -> Response:
        """Return the response, and print it while it is generated."""
        from transformers import TextStreamer

        streamer = TextStreamer(self.tokenizer, skip_special_tokens=True)
        prompt = self.encode(messages, variables)
        if self.parser.opens_thought(prompt):
            print(THINK)
        (ids,) = self._generate([prompt], sampling, streamer=streamer)
        streamer.end()
        return self.parser.parse(prompt, ids, (variables or {}).get("tools"))

    def encode(self, messages: Messages, variables: Mapping[str, Any] | None = None) -> list[int]:
        """Return the token ids of a prompt, up to where the response begins.

        Args:
            messages: The conversation.
            variables: What the chat template is given besides, such as `tools`.

        Raises:
            DataError: The prompt leaves no position for a response, or lacks a tool.
        """
        ids = self.template.encode_prompt(messages, variables)
        self.counts.update(self.template.count_prompt(messages, variables))
        if len(ids) >= self.n_positions:
            message = f"the prompt has {len(ids)} tokens, but the model has {self.n_positions} positions."
            raise DataError(f"{message} Shorten it to leave some for the response.", "too-large")
        return ids


def _streaming(streamer: "TextStreamer", is_stopped: IsStopped | None) -> IsStopped:
    """Return `is_stopped`, which also prints each token."""

    def show(ids: list[int]) -> bool:
        streamer.put(torch.tensor(ids[-1:]))
        return is_stopped is not None and is_stopped(ids)

    return show


def _conversation(prompt: str | Messages, index: int) -> Messages:
    """Return a prompt as messages. Raises ConfigError or DataError for any other type."""
    if isinstance(prompt, str):
        return [user(prompt)]
    if not isinstance(prompt, (list, tuple)):
        kind = type(prompt).__name__
        advice = "Write [[{...}]] for one conversation." if isinstance(prompt, dict) else "Pass one of these."
        raise ConfigError(
            f"prompts[{index}]: expected a string or a list of messages, got {kind}. {advice}", "wrong-type"
        )
    return parse_messages(prompt, f"prompts[{index}]")


def load_generator(
    source: str | Path,
    device: str = "auto",
    chat_template: str = "auto",
    trust_remote_code: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Generator:
    """Load the model of a run, a folder or the Hub to generate responses.

    The model keeps the dtype it was saved in if the device supports it natively; otherwise it becomes float32.

    Args:
        source: A run directory (its final/, or best/), a folder with a model or an adapter, or the name of a Hub model.
        device: "auto", "cpu", "cuda" or another PyTorch device.
        chat_template: "auto", the name of a template, or a path, as the option `chat_template`.
        trust_remote_code: Run the code of the model's repository.
        chat_template_kwargs: Arguments of the chat template instead of those of training.

    Raises:
        ConfigError: The folder does not exist or has no language model.
    """
    source = str(source)
    config = model_config(find_model(source), trust_remote_code)
    if trained_outputs(config) is not None:
        raise ConfigError(f"{source}: the model returns scores, not text. Use `minitrain score`.", "unsupported-model")
    tokenizer = load_tokenizer(config)
    template = Template(tokenizer, chat_template, variables=chat_template_kwargs)
    return Generator(load_saved(config, tokenizer, device).eval(), template)


def load_saved(config: ModelConfig, tokenizer, device: str, labels: list[str] | None = None) -> nn.Module:
    """Load a model in the dtype it was saved in, or in float32 if the device does not support that natively.

    Args:
        config: The model.
        tokenizer: Its tokenizer.
        device: "auto", or a PyTorch device.
        labels: Labels of a sequence head; None for a language model.
    """
    target = pick_device(device)
    saved = saved_dtype(config)
    dtype = DTYPES[saved] if saved in native_dtypes(target) else torch.float32
    if config.adapter:
        model = load_merged(config, tokenizer).to(dtype)
    else:
        model = load_model(config, tokenizer, 0, dtype, labels)
    return model.to(target)


def model_config(source: str, trust_remote_code: bool = False) -> ModelConfig:
    """Return the model options of a folder or Hub model; of an adapter's folder, its base model and the adapter."""
    if not (Path(source) / CONFIG_FILE).is_file():
        return ModelConfig(name_or_path=source, trust_remote_code=trust_remote_code)
    adapter = read_config(Path(source))
    base = adapter.get("base_model_name_or_path")
    if not isinstance(base, str) or (looks_local(base) and not Path(base).is_dir()):
        message = f"{source}: base model {base!r} does not exist (relative to {Path.cwd()})."
        advice = f"Correct base_model_name_or_path in {Path(source) / CONFIG_FILE}."
        raise ConfigError(f"{message} {advice}", "not-found")
    return ModelConfig(
        name_or_path=base,
        revision=adapter.get("revision"),
        adapter=source,
        tokenizer_name_or_path=source if (Path(source) / "tokenizer.json").is_file() else None,
        quantization=adapter.get("minitrain_quantization", "none"),
        trust_remote_code=trust_remote_code,
    )


def saved_dtype(config: ModelConfig) -> str | None:
    """Return the dtype in config.json; None without one, or if it cannot be read, which `load_model` then reports."""
    if config.name_or_path == "tiny":
        return None
    try:
        return str(read_model_config(config).dtype).removeprefix("torch.")
    except Exception:
        return None


def native_dtypes(device: torch.device) -> set[str]:
    """Return the 16-bit dtypes that a device computes in natively."""
    if device.type == "cuda":
        return {"float16", "bfloat16"} if torch.cuda.is_bf16_supported(including_emulation=False) else {"float16"}
    return {"bfloat16"} if device.type == "cpu" and cpu_has_bfloat16() else set()
