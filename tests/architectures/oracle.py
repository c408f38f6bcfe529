"""What the checks compare with: transformers, one document at a time, with the logits of all positions in float32."""

import functools
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from minitrain import load_config
from minitrain.batch import Batch, Document, collate
from minitrain.config.schema import Config
from minitrain.model.tiny import tiny_tokenizer

LENGTHS = (21, 9, 30, 13)  # longer than windows and chunks, and none a multiple of them
N_PROMPT = 3  # tokens at the start of a document that are not targets
N_SHARED = 6  # tokens that two documents share
TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3  # relative to the norm of a parameter's gradient

Gradients = dict[str, Tensor]


class NotApplicableError(Exception):
    """A check has nothing to compare."""


@functools.cache
def documents() -> list[Tensor]:
    """Return documents of random tokens, each [T]."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 259, (length,), generator=generator) for length in LENGTHS]


@functools.cache
def documents_with_shared_prompts() -> list[Tensor]:
    """Return documents of which the second and fourth begin as the one before them, each [T]."""
    first, second, third, fourth = (document.clone() for document in documents())
    second[:N_SHARED], fourth[:N_SHARED] = first[:N_SHARED], third[:N_SHARED]
    return [first, second, third, fourth]


def make_batch(rows: Iterable[Iterable[tuple[Tensor, int]]]) -> Batch:
    """Return a batch of rows of (document, number of tokens that it shares with the one before)."""

    def document(ids: Tensor, n_shared: int) -> Document:
        is_target = torch.arange(len(ids)) >= max(N_PROMPT, n_shared)
        return Document(ids.int(), is_target.byte(), n_shared)

    return collate([[document(*entry) for entry in row] for row in rows], 0)


def padded_batch() -> Batch:
    return make_batch([[(document, 0)] for document in documents()])


def logps_and_gradients(
    model: nn.Module, docs: list[Tensor], n_prompts: Iterable[int] = (N_PROMPT,) * len(LENGTHS)
) -> tuple[Tensor, Gradients]:
    """Return the logps of the targets of all documents [N], and the gradients of their mean."""
    logps = []
    for ids, n_prompt in zip(docs, n_prompts, strict=True):
        logits = model(input_ids=ids[None], use_cache=False).logits[0].float()  # [T, V]
        logps.append(logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[n_prompt - 1 :, 0])
    targets = torch.cat(logps)  # [N]
    model.zero_grad(set_to_none=True)
    (-targets.mean()).backward()
    return targets.detach(), gradients(model)


def logits_of(model: nn.Module) -> Tensor:
    """Return the logits of the longest document, shape [1, T, V] or [1, L]."""
    arguments = {} if model.get_output_embeddings() is None else {"use_cache": False}
    with torch.no_grad():
        return model.eval()(input_ids=documents()[2][None], **arguments).logits.float()


def gradients(module: nn.Module, prefix: str = "") -> Gradients:
    """Return the gradients of all parameters that have one, by name without `prefix`."""
    named = module.named_parameters()
    return {n.removeprefix(prefix): p.grad.detach().clone() for n, p in named if p.grad is not None}


def assert_equal(what: str, actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Raise AssertionError if a value is off by more than the tolerance, or NaN."""
    off = float((actual - expected).abs().max())
    assert off < tolerance, f"{what} are off by {off:.1g}"


def assert_same_gradients(actual: Gradients, expected: Gradients) -> None:
    """Raise AssertionError with the gradient that is off most. A gradient that one side lacks counts as 0."""
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    worst, worst_name = 0.0, ""
    for name in actual.keys() | expected.keys():
        a, b = actual.get(name), expected.get(name)
        a = torch.zeros_like(b) if a is None else a
        b = torch.zeros_like(a) if b is None else b
        off = float((a - b).norm() / torch.maximum(b.norm(), 1e-3 * total))
        if not off <= worst:
            worst, worst_name = off, name
    assert worst < GRADIENT_TOLERANCE, f"the gradient of {worst_name} is off by {worst:.1g}"


def assert_moved(after: Tensor, before: Tensor) -> None:
    """Raise AssertionError if training has not changed the logits."""
    assert float((after - before).abs().max()) > 1e-3, "training changes nothing"


def make_config(folder: Path, base: Path, *overrides: str) -> Config:
    """Return the config of a short run.

    Args:
        folder: A folder for data and runs.
        base: The folder of the model.
        overrides: Options as on the command line.
    """
    config = {
        "datasets": [str(folder / "rows.jsonl")],
        "model": {"name_or_path": str(base)},
        "output_dir": str(folder / "runs"),
        "exp_name": "run",
        "quiet": True,
        "device": "cpu",
        "max_length": 64,
        "total_batch_size": 4,
        "n_steps": 2,
        "lr": 1e-2,
        "lr_scheduler": "constant",
        "num_proc": 1,
    }
    return load_config(config, list(overrides))


def dtypes_of(folder: Path) -> dict[str, str]:
    """Return the dtype of each tensor in the safetensors files of a folder."""
    dtypes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            dtypes |= {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return dtypes


def write_data(folder: Path) -> None:
    """Write rows of each type of example that the checks train on."""
    numbers = range(12)
    rows = {
        "rows": [{"prompt": f"say {i}", "response": "ab" * (i % 5 + 1)} for i in numbers],
        "long": [{"prompt": f"say {i}", "response": "ab" * 150} for i in numbers],
        "labels": [{"text": f"say {i}" * (i % 3 + 1), "label": "abc"[i % 3]} for i in numbers],
        "pairs": [{"prompt": f"say {i}", "chosen": "ab" * (i % 5 + 1), "rejected": "c" * (i % 4 + 1)} for i in numbers],
    }
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


def save_base(model: nn.Module, folder: Path) -> Path:
    """Save a model and the embedded tokenizer as transformers does."""
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = 2
        model.generation_config.forced_eos_token_id = None  # minitrain does not apply such defaults
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
