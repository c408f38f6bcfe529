"""Answers from a model: batched, left-padded, with the template and the end tokens of its training."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from minitrain.config.issues import ConfigIssues, Source, check_types
from minitrain.config.option import MAX_SEED, option
from minitrain.config.sections import DatasetConfig, ModelConfig
from minitrain.data.examples import Messages, fill, turns_of, user
from minitrain.data.files import FORMATS, DataRow, check_is_file, format_of, read_rows
from minitrain.data.formats_raft import documents_of, raft_prompt
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
    """How the tokens of an answer are chosen.

    Attributes:
        max_new_tokens: Length of an answer in tokens, at most.
        temperature: Divides the logits; 0 takes the likeliest token each time.
        top_p: Sample from the likeliest tokens whose probabilities add up to this.
        seed: Seed of sampling.
    """

    max_new_tokens: int = option(256, "", ge=1)
    temperature: float = option(0.0, "", ge=0)
    top_p: float = option(1.0, "", gt=0, le=1)
    seed: int = option(0, "", ge=0, le=MAX_SEED)

    def __post_init__(self):
        issues = ConfigIssues(Source("Sampling"))
        check_types(Sampling, vars(self), "", issues)
        issues.raise_if_any()

    def arguments(self) -> dict[str, Any]:
        """Return them as arguments of a `GenerationConfig`."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


class Generator:
    """A model with its tokenizer and chat template, as `load_generator` and `Trainer.generator` give it.

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
            gathered: For a sharded model; every rank then has to ask for the same.
            position_limit: The longest text with its answer, in tokens; None for what the model's config says.
        """
        self.model, self.template, self.gathered = model, template, gathered
        self.tokenizer = template.tokenizer
        n_virtual = model.soft_prompt.n_tokens if hasattr(model, "soft_prompt") else 0
        self.n_positions = n_positions(model) - n_virtual if position_limit is None else position_limit
        self.batch_limit = min(self.n_positions, rotary_limit(model) - n_virtual)  # beyond it a batch has one length
        self.calls = 0

    def __repr__(self) -> str:
        return f"<Generator: {type(self.model).__name__}>"

    @functools.cached_property
    def end_ids(self) -> list[int]:
        """The tokens that an answer ends with."""
        if not self.model.can_generate():
            raise ConfigError(
                "this model gives scores and no text, so it cannot answer; see `minitrain score`.", "unsupported-model"
            )
        return self.template.end_ids()

    def answer(
        self, prompts: list[list[int]], sampling: Sampling, batch_size: int = 16, progress: bool = False
    ) -> list[str]:
        """Answers to prompts given as token ids, in their order; the end token is not part of the text."""
        # An answer may take what room the longest prompt of its batch leaves, so short of room all are of one length.
        limit = self.batch_limit - sampling.max_new_tokens
        answers = [""] * len(prompts)
        with tqdm(total=len(prompts), unit=" prompts", disable=None if progress else True, leave=False) as bar:
            for chosen in batches_by_length([len(ids) for ids in prompts], batch_size, limit):
                ids = self._generate([prompts[i] for i in chosen], sampling)
                for i, text in zip(chosen, self.tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
                    answers[i] = text
                bar.update(len(chosen))
        return answers

    def generate(
        self, prompts: Sequence[str | Messages], sampling: Sampling | None = None, batch_size: int = 16
    ) -> list[str]:
        """Return the answers to prompts, each a string or a list of messages that ends with a turn of the user."""
        if isinstance(prompts, str):
            raise ConfigError(f"prompts: expected a list, got a string. Write [{prompts!r}].", "wrong-type")
        if not isinstance(sampling, Sampling | None):
            raise ConfigError(f"sampling: expected a Sampling, got {sampling!r}. Write Sampling(...).", "wrong-type")
        ids = [self.encode(_conversation(prompt, index)) for index, prompt in enumerate(prompts)]
        return self.answer(ids, sampling or Sampling(), batch_size)

    def stream(self, messages: Messages, sampling: Sampling) -> str:
        """Prints the answer as it comes, and returns it."""
        from transformers import TextStreamer

        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = self._generate([self.encode(messages)], sampling, streamer)
        return self.tokenizer.decode(ids[0], skip_special_tokens=True)

    def encode(self, messages: Messages) -> list[int]:
        """Token ids up to where the answer begins. Raises DataError where the model has no place for an answer."""
        ids = self.template.encode_prompt(messages)
        if len(ids) >= self.n_positions:
            raise DataError(
                f"{len(ids)} tokens leave no place for an answer: the model has {self.n_positions} places", "too-large"
            )
        return ids

    def _generate(self, prompts: list[list[int]], sampling: Sampling, streamer=None) -> torch.Tensor:
        """Left-padded generation -> ids of the answers [B, <= max_new_tokens]."""
        from transformers import GenerationConfig

        end_ids, width = self.end_ids, max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        with inference(self.model), self.gathered():
            device = self.model.get_input_embeddings().weight.device
            ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)  # [B, T]
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)  # [B, T]
            if sampling.temperature > 0:  # `inference` puts the random state back, so each call needs a seed of its own
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
        """What `model.generate` takes for [B, T] ids, and how many columns of its output are no answer."""
        prompt = getattr(self.model, "soft_prompt", None)
        if prompt is None:
            return {"input_ids": ids, "attention_mask": mask}, ids.shape[1]
        inputs = prompt(ids, self.model.get_input_embeddings(), self.model.dtype, fixed=False)
        places = mask.new_ones(len(ids), prompt.n_tokens)  # [B, n]
        inputs["attention_mask"] = torch.cat([places, mask], 1)
        if prompt.method == "prompt":
            return inputs, 0
        inputs["input_ids"] = torch.cat([places, ids], 1)  # `generate` drops as many ids as the cache holds
        return inputs, inputs["input_ids"].shape[1]


def _conversation(prompt: str | Messages, index: int) -> Messages:
    """Return a prompt as messages. Raises ConfigError or DataError for what is neither."""
    if isinstance(prompt, str):
        return [user(prompt)]
    if not isinstance(prompt, (list, tuple)):
        kind = type(prompt).__name__
        advice = "Write [[{...}]] for one conversation." if isinstance(prompt, dict) else "Give a list of them."
        raise ConfigError(
            f"prompts[{index}]: expected a string or a list of messages, got {kind}. {advice}", "wrong-type"
        )
    return turns_of(prompt, f"prompts[{index}]")


@contextlib.contextmanager
def _without_defaults(model: nn.Module) -> Iterator[None]:
    """Inside, `model.generate` follows only the options of the call.

    transformers fills every option that a call leaves out from the model's generation_config.json, so a base model with
    a repetition penalty would have it in greedy answers too.
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
    """Load the model of a run, a folder or the Hub to generate answers with.

    The model keeps the dtype it was saved in if the processor computes in it; otherwise it becomes float32.

    Args:
        source: A run directory (its final/, or best/), a folder with a model or an adapter, or a name on the Hub.
        device: "auto", "cpu", "cuda" or another device of PyTorch.
        chat_template: "auto", the name of a template, or the path of a file, as the option of that name.
        trust_remote_code: Run the code of the model's repository.

    Raises:
        ConfigError: The folder does not exist or holds no language model.
    """
    source = str(source)
    config = model_config(find_model(source), trust_remote_code)
    if trained_outputs(config) is not None:
        raise ConfigError(f"{source}: this model gives scores and no text; use `minitrain score`.", "unsupported-model")
    tokenizer = load_tokenizer(config)
    template = Template(tokenizer, chat_template)
    return Generator(load_saved(config, tokenizer, device).eval(), template)


def load_saved(config: ModelConfig, tokenizer, device: str, labels: list[str] | None = None) -> nn.Module:
    """Load a model in the dtype that it was saved in, or in float32 where the processor does not compute in that.

    Args:
        labels: Outputs of a sequence head.
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
    """Where the model of a folder or hub name is; of an adapter's folder, its base and the adapter."""
    if not (Path(source) / CONFIG_FILE).is_file():
        return ModelConfig(name_or_path=source, trust_remote_code=trust_remote_code)
    adapter = read_config(Path(source))
    base = adapter.get("base_model_name_or_path")
    if not isinstance(base, str) or (looks_local(base) and not Path(base).is_dir()):
        told = f"{source}: its base model {base!r} is not there (seen from {Path.cwd()})"
        raise ConfigError(f"{told}; mend base_model_name_or_path in {Path(source) / CONFIG_FILE}.", "not-found")
    return ModelConfig(
        name_or_path=base,
        revision=adapter.get("revision"),
        adapter=source,
        tokenizer_name_or_path=source if (Path(source) / "tokenizer.json").is_file() else None,
        quantization=adapter.get("minitrain_quantization", "none"),
        trust_remote_code=trust_remote_code,
    )


def saved_dtype(config: ModelConfig) -> str | None:
    """The dtype named in config.json; None when nothing is named or can be read, which `load_model` then tells."""
    if config.name_or_path == "tiny":
        return None
    try:
        return str(read_model_config(config).dtype).removeprefix("torch.")
    except Exception:
        return None


def native_dtypes(device: torch.device) -> set[str]:
    """What this processor computes in, besides float32."""
    if device.type == "cuda":
        return {"float16", "bfloat16"} if torch.cuda.is_bf16_supported(including_emulation=False) else {"float16"}
    return {"bfloat16"} if device.type == "cpu" and cpu_has_bfloat16() else set()


class Prompt(NamedTuple):
    """What is asked: where it stands (for error messages), the row it came in, and the conversation."""

    where: str
    row: dict
    messages: Messages


def read_prompts(path: Path, template: str | None = None) -> Iterator[Prompt]:
    """Prompts from a .txt file with one a line, or from rows with messages, prompt, question, instruction or query.

    Questions with documents (RAFT) become the prompts of training, the oracle always among them. A last turn of the
    assistant is left out, so that a training file serves too. `template` is the prompt_template of training. Raises
    DataError.
    """
    check_is_file(path)
    if path.suffix == ".txt":
        rows = _text_rows(path)
    elif format_of(path) in FORMATS:
        rows = read_rows(path)
    else:
        raise DataError(f"{path}: expected a .txt, .{', .'.join(FORMATS)} file", "wrong-format")
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
                raise DataError(f"{path}:{number}: not UTF-8 text", "invalid-text") from None
            if text.strip():
                yield number, {"prompt": text}


def messages_of(row: dict, template: str | None = None) -> Messages:
    """The conversation up to the answer. Raises DataError."""
    if "messages" in row:
        return _unanswered(row["messages"], template)
    if "prompt" not in row and (documents := documents_of(row)) is not None:
        return [user(raft_prompt(row, documents, DatasetConfig(path="", prompt_template=template)))]
    for key in ("prompt", "question", "instruction", "query"):
        if isinstance(row.get(key), str):
            text = row[key] + (f"\n{row['input']}" if key == "instruction" and row.get("input") else "")
            return [user(text if template is None else fill(template, row | {"prompt": text}, "--prompt-template"))]
    raise DataError(
        f"none of the keys messages, prompt, question, instruction, query; the row has {', '.join(row)}", "invalid-row"
    )


def _unanswered(value: object, template: str | None) -> Messages:
    messages = turns_of(value, "messages")
    messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not messages:
        raise DataError("messages holds no turn of the user", "invalid-row")
    if template is not None:
        raise DataError("--prompt-template does not apply to messages", "no-effect")
    return messages


def read_documents(paths: list[str]) -> list[str]:
    """The texts of files, in their order. Raises DataError."""
    texts = []
    for path in paths:
        try:
            texts.append(Path(path).read_text(encoding="utf-8-sig").strip())
        except UnicodeDecodeError:
            raise DataError(f"{path}: not UTF-8 text", "invalid-text") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}", "unreadable") from None
        if not texts[-1]:
            raise DataError(f"{path}: is empty", "no-data")
    return texts
