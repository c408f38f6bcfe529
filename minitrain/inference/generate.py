"""Generate responses in left-padded batches, with the chat template and end tokens of training."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from minitrain.config.issues import ConfigIssues, ConfigSource, check_types
from minitrain.config.option import MAX_SEED, option
from minitrain.config.sections import DatasetConfig, ModelConfig
from minitrain.data.examples import fill
from minitrain.data.files import FORMATS, DataRow, check_is_file, format_of, read_rows
from minitrain.data.formats_raft import documents_of, raft_prompt
from minitrain.data.messages import Messages, parse_messages, user
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
        self.tokenizer = template.tokenizer
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

    def generate_from_ids(
        self, prompts: list[list[int]], sampling: Sampling, batch_size: int = 16, progress: bool = False
    ) -> list[str]:
        """Return the responses to tokenized prompts, in their order and without end tokens."""
        # The longest prompt of a batch limits its responses, so prompts near the limit are batched by equal length.
        limit = self.batch_limit - sampling.max_new_tokens
        responses = [""] * len(prompts)
        with tqdm(total=len(prompts), unit=" prompts", disable=None if progress else True, leave=False) as bar:
            for chosen in batches_by_length([len(ids) for ids in prompts], batch_size, limit):
                ids = self._generate([prompts[i] for i in chosen], sampling)
                for i, text in zip(chosen, self.tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
                    responses[i] = text
                bar.update(len(chosen))
        return responses

    def generate(
        self, prompts: Sequence[str | Messages], sampling: Sampling | None = None, batch_size: int = 16
    ) -> list[str]:
        """Return the responses to prompts, each a string or a list of messages that ends with a user turn."""
        if isinstance(prompts, str):
            raise ConfigError(f"prompts: expected a list, got a string. Write [{prompts!r}].", "wrong-type")
        if not isinstance(sampling, Sampling | None):
            raise ConfigError(f"sampling: expected a Sampling, got {sampling!r}. Write Sampling(...).", "wrong-type")
        ids = [self.encode(_conversation(prompt, index)) for index, prompt in enumerate(prompts)]
        return self.generate_from_ids(ids, sampling or Sampling(), batch_size)

    def stream(self, messages: Messages, sampling: Sampling) -> str:
        """Return the response, and print it while it is generated."""
        from transformers import TextStreamer

        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = self._generate([self.encode(messages)], sampling, streamer)
        return self.tokenizer.decode(ids[0], skip_special_tokens=True)

    def encode(self, messages: Messages) -> list[int]:
        """Return the token ids of a prompt, up to where the response begins.

        Raises:
            DataError: The prompt leaves no position for a response.
        """
        ids = self.template.encode_prompt(messages)
        if len(ids) >= self.n_positions:
            message = f"the prompt has {len(ids)} tokens, but the model has {self.n_positions} positions."
            raise DataError(f"{message} Shorten it to leave some for the response.", "too-large")
        return ids

    def _generate(self, prompts: list[list[int]], sampling: Sampling, streamer=None) -> torch.Tensor:
        """Generate from a left-padded batch, and return the ids of the responses, shape [B, <= max_new_tokens]."""
        from transformers import GenerationConfig

        end_ids, width = self.end_ids, max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        with inference(self.model), self.gathered():
            device = self.model.get_input_embeddings().weight.device
            ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)  # [B, T]
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)  # [B, T]
            if sampling.temperature > 0:  # `inference` restores the random state, so each call needs its own seed
                torch.manual_seed(sampling.seed + self.calls)
            self.calls += 1
            inputs, width = self._inputs(ids, mask)
            options = GenerationConfig(
                max_new_tokens=max(1, min(sampling.max_new_tokens, self.n_positions - ids.shape[1])),
                eos_token_id=end_ids,
                pad_token_id=pad,
                use_cache=True,
                **sampling.arguments(),
            )
            with _without_defaults(self.model), restoring_rotary(self.model):
                output = self.model.generate(**inputs, generation_config=options, streamer=streamer)
        return output[:, width:]

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
    source: str | Path, device: str = "auto", chat_template: str = "auto", trust_remote_code: bool = False
) -> Generator:
    """Load the model of a run, a folder or the Hub to generate responses.

    The model keeps the dtype it was saved in if the device supports it natively; otherwise it becomes float32.

    Args:
        source: A run directory (its final/, or best/), a folder with a model or an adapter, or the name of a Hub model.
        device: "auto", "cpu", "cuda" or another PyTorch device.
        chat_template: "auto", the name of a template, or a path, as the option `chat_template`.
        trust_remote_code: Run the code of the model's repository.

    Raises:
        ConfigError: The folder does not exist or has no language model.
    """
    source = str(source)
    config = model_config(find_model(source), trust_remote_code)
    if trained_outputs(config) is not None:
        raise ConfigError(f"{source}: the model returns scores, not text. Use `minitrain score`.", "unsupported-model")
    tokenizer = load_tokenizer(config)
    template = Template(tokenizer, chat_template)
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


class Prompt(NamedTuple):
    """A prompt: its location (for error messages), its row, and its conversation."""

    where: str
    row: dict
    messages: Messages


def read_prompts(path: Path, template: str | None = None) -> Iterator[Prompt]:
    """Yield the prompts of a .txt file, one per line, or of rows with one of the keys of `messages_of`.

    Args:
        path: The file. It may be a training file: the last assistant turn of a conversation is dropped.
        template: The prompt_template of training.

    Raises:
        DataError: The file cannot be read, or a row has no prompt.
    """
    check_is_file(path)
    if path.suffix == ".txt":
        rows = _text_rows(path)
    elif format_of(path) in FORMATS:
        rows = read_rows(path)
    else:
        raise DataError(f"{path}: expected a .txt, .{', .'.join(FORMATS)} file. Convert it.", "wrong-format")
    for line, row in rows:
        where = f"{path}:{line}"
        if isinstance(row, DataError):
            raise row.at(where)
        try:
            yield Prompt(where, row, messages_of(row, template))
        except DataError as error:
            raise error.at(where) from None


def _text_rows(path: Path) -> Iterator[DataRow]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
            except UnicodeDecodeError:
                raise DataError(f"{path}:{number}: invalid UTF-8. Save the file as UTF-8.", "invalid-text") from None
            if text.strip():
                yield number, {"prompt": text}


def messages_of(row: dict, template: str | None = None) -> Messages:
    """Return the conversation of a row up to the response. Raises DataError.

    A question with documents (RAFT) becomes the prompt of training, always with the oracle document.
    """
    if "messages" in row:
        return _prompt_messages(row["messages"], template)
    if "prompt" not in row and (documents := documents_of(row)) is not None:
        return [user(raft_prompt(row, documents, DatasetConfig(path="", prompt_template=template)))]
    for key in ("prompt", "question", "instruction", "query"):
        if isinstance(row.get(key), str):
            text = row[key] + (f"\n{row['input']}" if key == "instruction" and row.get("input") else "")
            return [user(text if template is None else fill(template, row | {"prompt": text}, "--prompt-template"))]
    message = "expected messages, or a string with the key prompt, question, instruction or query, got the keys"
    raise DataError(f"{message} {', '.join(row)}. Correct the row.", "invalid-row")


def _prompt_messages(value: object, template: str | None) -> Messages:
    messages = parse_messages(value, "messages")
    messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not messages:
        raise DataError("messages: has no user turn. Add one.", "invalid-row")
    if template is not None:
        raise DataError("--prompt-template: has no effect on messages. Remove it.", "no-effect")
    return messages


def read_documents(paths: list[str]) -> list[str]:
    """Return the texts of files, in their order. Raises DataError."""
    texts = []
    for path in paths:
        try:
            texts.append(Path(path).read_text(encoding="utf-8-sig").strip())
        except UnicodeDecodeError:
            raise DataError(f"{path}: invalid UTF-8. Save the file as UTF-8.", "invalid-text") from None
        except OSError as error:
            message = f"{path}: cannot be read: {error.strerror}. Check the path and its permissions."
            raise DataError(message, "unreadable") from None
        if not texts[-1]:
            raise DataError(f"{path}: is empty. Remove it.", "no-data")
    return texts
