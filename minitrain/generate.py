"""Answers from a model: batched, left-padded, with the template and the end tokens of its training."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from .data.files import FORMATS, read_rows
from .data.template import Template
from .engine.parallel import pick_device
from .errors import ConfigError, DataError
from .evaluate import inference
from .model.heads import cpu_has_bfloat16
from .model.load import load_model, load_tokenizer
from .schema import ModelConfig

Messages = list[dict[str, str]]


@dataclass
class Sampling:
    """How tokens are chosen. Temperature 0 takes the likeliest token each time."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0

    def arguments(self) -> dict:
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
        }


class Generator:
    """A model with its template."""

    def __init__(self, model: nn.Module, template: Template):
        self.model, self.template = model, template
        self.tokenizer = template.tokenizer
        self.end_ids = template.end_ids()

    def answer(
        self, prompts: list[list[int]], sampling: Sampling, batch_size: int = 16, progress: bool = False
    ) -> list[str]:
        """Answers to prompts given as token ids, in their order; the end token is not part of the text."""
        by_length = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        answers = [""] * len(prompts)
        with tqdm(total=len(prompts), unit=" prompts", disable=None if progress else True, leave=False) as bar:
            for start in range(0, len(prompts), batch_size):
                chosen = by_length[start : start + batch_size]
                ids = self._generate([prompts[i] for i in chosen], sampling)
                for i, text in zip(chosen, self.tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
                    answers[i] = text
                bar.update(len(chosen))
        return answers

    def answer_messages(self, conversations: list[Messages], sampling: Sampling, **kwargs) -> list[str]:
        """Answers to conversations that end with a turn of the user."""
        return self.answer([self.template.encode_prompt(messages) for messages in conversations], sampling, **kwargs)

    def _generate(self, prompts: list[list[int]], sampling: Sampling, streamer=None) -> torch.Tensor:
        """Left-padded generation -> ids of the answers [B, <= max_new_tokens]."""
        device = next(self.model.parameters()).device
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)  # [B, T]
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)  # [B, T]
        with inference(self.model):
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                eos_token_id=self.end_ids,
                pad_token_id=pad,
                use_cache=True,
                streamer=streamer,
                **sampling.arguments(),
            )
        return output[:, width:]

    def stream(self, messages: Messages, sampling: Sampling) -> str:
        """Prints the answer as it comes, and returns it."""
        from transformers import TextStreamer

        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = self._generate([self.template.encode_prompt(messages)], sampling, streamer)
        return self.tokenizer.decode(ids[0], skip_special_tokens=True)


def load_generator(
    source: str, device: str = "auto", chat_template: str = "auto", trust_remote_code: bool = False
) -> Generator:
    """A generator from a run folder (its final/ model, or best/), a model's folder, or a hub name."""
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").exists():
        inner = [folder / name for name in ("final", "best") if (folder / name / "config.json").exists()]
        if not inner:
            raise ConfigError(f"{source}: holds neither a model (config.json) nor a finished run (final/).")
        folder = inner[0]
    elif not folder.exists() and source.startswith((".", "/")):
        raise ConfigError(f"{source}: there is no such folder.")
    name = str(folder) if folder.is_dir() else source
    config = ModelConfig(name_or_path=name, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(config)
    template = Template(tokenizer, chat_template)
    place = pick_device(device)
    if (place.type == "cpu" and cpu_has_bfloat16()) or place.type == "cuda":
        config.master_dtype = _saved_dtype(folder)
    return Generator(load_model(config, tokenizer, seed=0).to(place).eval(), template)


def _saved_dtype(folder: Path) -> str:
    saved = json.loads((folder / "config.json").read_text()).get("dtype") if folder.is_dir() else None
    return saved if saved in ("float32", "bfloat16", "float16") else "bfloat16"


def read_prompts(path: Path) -> Iterator[tuple[dict, Messages]]:
    """(row, messages) from a .txt file with a prompt a line, or rows with messages, prompt, question or instruction.

    A last turn of the assistant is left out, so that a training file serves too.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    if path.suffix == ".txt":
        rows = ((n, {"prompt": line}) for n, line in enumerate(path.read_text("utf-8").splitlines(), 1) if line.strip())
    elif path.name.removesuffix(".gz").rpartition(".")[2] in FORMATS:
        rows = read_rows(path)
    else:
        raise DataError(f"{path}: expected a .txt, .jsonl, .json or .csv file")
    for line, row in rows:
        if isinstance(row, DataError):
            raise DataError(f"{path}:{line}: {row}")
        yield row, _messages_of(row, f"{path}:{line}")


def _messages_of(row: dict, where: str) -> Messages:
    if isinstance(row.get("messages"), list):
        messages = row["messages"]
        if messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
            messages = messages[:-1]
        if messages and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
            return messages
        raise DataError(f"{where}: messages is not a list of objects with role and content")
    for key in ("prompt", "question", "instruction", "query"):
        if isinstance(row.get(key), str):
            extra = "\n" + row["input"] if key == "instruction" and row.get("input") else ""
            return [{"role": "user", "content": row[key] + extra}]
    raise DataError(f"{where}: found none of the keys messages, prompt, question, instruction, query")
