"""Generate responses in batches with the chat template and end tokens of training."""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from minitrain.config.issues import ConfigIssues, ConfigSource, check_types
from minitrain.config.option import MAX_SEED, option
from minitrain.config.sections import ModelConfig
from minitrain.data.messages import Message, Messages, parse_messages, user
from minitrain.data.template import Template
from minitrain.distributed.parallel import pick_device
from minitrain.errors import ConfigError, DataError
from minitrain.io.paths import looks_local
from minitrain.model.adapter_config import CONFIG_FILE, read_config
from minitrain.model.load import DTYPES, load_merged, load_model, load_tokenizer, trained_outputs
from minitrain.model.logprobs import cpu_has_bfloat16
from minitrain.model.positions import batches_by_length, n_positions, restoring_rotary, rotary_limit
from minitrain.model.pretrained import read_model_config
from minitrain.training.step import inference

from .batching import is_unchanged_in_batch
from .parse import THINK, Response, ResponseParser
from .prompts import python_variables
from .resolve import find_model


@dataclass
class Sampling:
    """How the tokens of a response are chosen.

    Attributes:
        max_new_tokens: Maximum number of tokens of a response.
        temperature: Divides the logits. 0 is greedy decoding.
        top_p: Sample from the smallest set of most likely tokens whose probabilities sum to this.
        seed: Seed for sampling.
    """

    max_new_tokens: int = option(256, "", ge=1)
    temperature: float = option(0.0, "", ge=0)
    top_p: float = option(1.0, "", gt=0, le=1)
    seed: int = option(0, "", ge=0, le=MAX_SEED)

    def __post_init__(self):
        issues = ConfigIssues(ConfigSource("Sampling"))
        check_types(Sampling, vars(self), "", issues)
        issues.raise_if_any()

    def arguments(self) -> dict[str, Any]:
        """Return the arguments for a `GenerationConfig`."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


class Generator:
    """A model with its tokenizer and chat template. `load_generator` and `Trainer.generator` return one.

    >>> load_generator("runs/quickstart-sft").generate(["57 + 36 ="], Sampling(max_new_tokens=8))

    Attributes:
        counts: What became of the fields of all prompts, by the keys of `minitrain.data.counts`.
    """

    def __init__(
        self,
        model: nn.Module,
        template: Template,
        gathered: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        position_limit: int | None = None,
    ):
        """
        Args:
            model: The model, in evaluation mode.
            template: The chat template with the tokenizer.
            gathered: Context in which a sharded model has its full weights. All ranks must generate from the same
                prompts.
            position_limit: Maximum number of tokens of a prompt with its response (default: from the model's config).
        """
        self.model, self.template, self.gathered = model, template, gathered
        self.tokenizer, self.parser = template.tokenizer, ResponseParser(template)
        self.counts: Counter[str] = Counter()
        n_virtual = model.soft_prompt.n_tokens if hasattr(model, "soft_prompt") else 0
        self.n_positions = n_positions(model) - n_virtual if position_limit is None else position_limit
        self.batch_limit = min(
            self.n_positions, rotary_limit(model) - n_virtual
        )  # above it, a batch has prompts of one length
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
    def can_pad(self) -> bool:
        """Whether left padding changes no response. It does if a model ignores the mask, or counts positions itself."""
        return is_unchanged_in_batch(self._run_trial, self.n_positions, self.model.dtype, padded=True)

    @functools.cached_property
    def can_batch(self) -> bool:
        """Whether a batch of prompts of one length changes no response. In RWKV it does (transformers 5.23)."""
        return self.can_pad or is_unchanged_in_batch(self._run_trial, self.n_positions, self.model.dtype, padded=False)

    def _run_trial(self, prompts: list[list[int]], n_steps: int) -> Sequence[torch.Tensor]:
        options = {"output_logits": True, "return_dict_in_generate": True}
        return self._run(prompts, Sampling(n_steps), **options)[0].logits

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
            batch_size: Number of prompts per batch.
            progress: Show a progress bar.
            tools: The tools of each prompt, by which a tokenizer's response template reads calls.
        """
        # The longest prompt of a batch limits its responses, so prompts near the limit are batched by equal length.
        limit = self.batch_limit - sampling.max_new_tokens
        if min(batch_size, len(prompts)) > 1:
            batch_size, limit = batch_size if self.can_batch else 1, limit if self.can_pad else 0
        responses: list[Response] = [Response("", {})] * len(prompts)
        with tqdm(total=len(prompts), unit=" prompts", disable=None if progress else True, leave=False) as bar:
            for chosen in batches_by_length([len(ids) for ids in prompts], batch_size, limit):
                ids = self._generate([prompts[i] for i in chosen], sampling).tolist()
                for i, response in zip(chosen, ids, strict=True):
                    responses[i] = self._parse(prompts[i], response, tools[i] if tools else None)
                bar.update(len(chosen))
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
        if isinstance(prompts, str):
            raise ConfigError(f"prompts: expected a list, got a string. Write [{prompts!r}].", "wrong-type")
        if not isinstance(sampling, Sampling | None):
            raise ConfigError(f"sampling: expected a Sampling, got {sampling!r}. Write Sampling(...).", "wrong-type")
        variables = python_variables(self.template.renderer, tools, chat_template_kwargs)
        ids = [self.encode(_conversation(prompt, index), variables) for index, prompt in enumerate(prompts)]
        tools_of_prompts = [variables.get("tools")] * len(ids)
        return self.generate_from_ids(ids, sampling or Sampling(), batch_size, tools=tools_of_prompts)

    def stream(self, messages: Messages, sampling: Sampling, variables: Mapping[str, Any] | None = None) -> Response:
        """Return the response, and print it while it is generated."""
        from transformers import TextStreamer

        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        prompt = self.encode(messages, variables)
        if self.parser.opens_thought(prompt):
            print(THINK)
        ids = self._generate([prompt], sampling, streamer).tolist()
        return self._parse(prompt, ids[0], (variables or {}).get("tools"))

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

    def _parse(self, prompt: list[int], ids: list[int], tools: list[dict] | None) -> Response:
        """Return a response from its ids, which end at its end token or are padded after it."""
        stop = next((i for i, token in enumerate(ids) if token in self.end_ids), len(ids))
        return self.parser.parse(prompt, ids[: stop + 1], tools)

    def _generate(self, prompts: list[list[int]], sampling: Sampling, streamer=None) -> torch.Tensor:
        """Generate from a left-padded batch, and return the ids of the responses, shape [B, <= max_new_tokens]."""
        output, width = self._run(prompts, sampling, streamer)
        self.calls += 1
        return output[:, width:]

    def _run(self, prompts: list[list[int]], sampling: Sampling, streamer=None, **options) -> tuple[Any, int]:
        """Return the output of `model.generate` for a left-padded batch, and where the response begins in it."""
        from transformers import GenerationConfig

        end_ids, width = self.end_ids, max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        with inference(self.model), self.gathered():
            device = self.model.get_input_embeddings().weight.device
            ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)  # [B, T]
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)  # [B, T]
            if sampling.temperature > 0:  # `inference` restores the random state, so each call needs its own seed
                torch.manual_seed(sampling.seed + self.calls)
            inputs, width = self._inputs(ids, mask)
            generation_config = GenerationConfig(
                max_new_tokens=max(1, min(sampling.max_new_tokens, self.n_positions - ids.shape[1])),
                eos_token_id=end_ids,
                pad_token_id=pad,
                use_cache=True,
                **sampling.arguments(),
                **options,
            )
            with _without_defaults(self.model), restoring_rotary(self.model):
                return self.model.generate(**inputs, generation_config=generation_config, streamer=streamer), width

    def _inputs(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[dict, int]:
        """Return the inputs of `model.generate` for ids [B, T], and where the response begins in its output."""
        prompt = getattr(self.model, "soft_prompt", None)
        if prompt is None:
            return {"input_ids": ids, "attention_mask": mask}, ids.shape[1]
        inputs = prompt(ids, self.model.get_input_embeddings(), self.model.dtype, fixed=False)
        virtual = mask.new_ones(len(ids), prompt.n_tokens)  # [B, n]
        inputs["attention_mask"] = torch.cat([virtual, mask], 1)
        if prompt.method == "prompt":
            return inputs, 0
        inputs["input_ids"] = torch.cat([virtual, ids], 1)  # `generate` drops as many ids as the cache holds
        return inputs, inputs["input_ids"].shape[1]


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


@contextlib.contextmanager
def _without_defaults(model: nn.Module) -> Iterator[None]:
    """Make `model.generate` ignore the model's generation_config.json.

    transformers takes from it every option that a call omits, such as a repetition penalty, even for greedy decoding.
    """
    defaults = model.generation_config
    model.generation_config = type(defaults)()
    try:
        yield
    finally:
        model.generation_config = defaults


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
