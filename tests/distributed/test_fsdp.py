"""FSDP is the same training: gradients, clipped steps, logged losses and saved models of 1 and 2 ranks agree."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minitrain.tools.analysis.compare import read_ledger
from tests.distributed.launch import launch, trace


def figures(job: dict, kind: str = "train") -> list[dict]:
    lines = (Path(job["config"]["output_dir"]) / job["config"]["exp_name"] / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def same_training(found: dict, wanted: dict, rtol: float = 1e-5) -> None:
    """Gradients of step 1, losses and norms of all steps, order of examples, final weights."""
    # AdamW divides by the root of the second moment, so rounding of a gradient near 0 becomes part of a step (lr 1e-2).
    for file, tolerance in (("gradients", 1e-6), ("ended", 5e-4)):
        ours, theirs = load_file(found[file]), load_file(wanted[file])
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=tolerance, msg=f"{file} {name}")
    assert [line[1] for line in trace(Path(found["trace"]))] == [line[1] for line in trace(Path(wanted["trace"]))]
    ledgers = [read_ledger(Path(job["config"]["output_dir"]) / job["config"]["exp_name"]) for job in (found, wanted)]
    for ours, theirs in zip(*(ledger.values() for ledger in ledgers), strict=True):
        assert ours.tokens == theirs.tokens and ours[1:] == pytest.approx(theirs[1:], rel=rtol)
    for ours, theirs in zip(figures(found), figures(wanted), strict=True):
        for key in ("loss", "grad_norm", "tokens", "lr"):
            assert ours[key] == pytest.approx(theirs[key], rel=rtol), key


SETTINGS = {
    "plain": (),
    "frozen": ("freeze_layers=[0, embeddings]",),
    "packed": ("packing=true", "gradient_accumulation_steps=2"),
    "budget": ("max_tokens_per_micro_batch=90",),
    "uneven": ("total_batch_size=6", "n_steps=8", "gradient_accumulation_steps=3"),  # an epoch of 40 ends within
    "lora": ("lora.rank=4", "lora.dropout=0", "lora.modules_to_save=[norm]", "lora.loraplus_lr_ratio=4"),
    "pissa": ("lora.rank=4", "lora.init=pissa", "lora.use_dora=true", "activation_checkpointing=true"),
    "prompt": ("soft_prompt.num_virtual_tokens=4", "soft_prompt.init_text=say"),
    "prefix": ("soft_prompt.num_virtual_tokens=4", "soft_prompt.method=prefix"),
    "kd": ("loss.name=kd", "loss.teacher=tiny", "packing=true", "validation_split=7", "eval_batch_size=3"),
    "new-full": ("model.tokenizer_name_or_path=MORE",),
    "new-lora": ("lora.rank=4", "model.tokenizer_name_or_path=MORE"),
    "new-saved": ("lora.rank=4", "lora.modules_to_save=[embed_tokens]", "model.tokenizer_name_or_path=MORE"),
    "new-frozen": ("freeze_layers=[0, embeddings]", "model.tokenizer_name_or_path=MORE"),
    "new-prompt": ("soft_prompt.num_virtual_tokens=4", "model.tokenizer_name_or_path=MORE"),
    "dft": ("loss.name=dft", "activation_checkpointing=selective", "validation_split=7", "eval_batch_size=3"),
}


def test_two_ranks_train_as_one_process(job, scratch, more_bytes_folder):
    """For full, grad and none: what a step computes does not depend on who computes it
    (transformers#34242, torchtitan#1842, pytorch#72548, pytorch#25162)."""
    settings = {
        name: [override.replace("MORE", more_bytes_folder) for override in overrides]
        for name, overrides in SETTINGS.items()
    }
    alone = {name: job(f"alone-{name}", *overrides) for name, overrides in settings.items()}
    launch(0, list(alone.values()), scratch / "alone")
    shards = {"full": SETTINGS, "grad": ("plain", "uneven"), "none": ("frozen", "uneven", "packed", "lora", "kd")}
    chosen = [(shard, name) for shard, names in shards.items() for name in names]
    ranked = [(job(f"{shard}-{name}", *settings[name], fsdp=shard), alone[name]) for shard, name in chosen]
    launch(2, [ours for ours, _ in ranked], scratch / "ranks")
    for ours, wanted in ranked:
        same_training(ours, wanted)
        for mine, theirs in zip(figures(ours, "eval"), figures(wanted, "eval"), strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_a_model_and_rows_from_python(job, scratch):
    """Each rank has the whole model and keeps its shard; the same training as from files."""
    settings = {"plain": (), "lora": ("lora.rank=4", "packing=true")}
    files = [job(f"file-{name}", *overrides, fsdp="full") for name, overrides in settings.items()]
    objects = [job(f"python-{name}", *overrides, fsdp="full", in_python=True) for name, overrides in settings.items()]
    launch(2, files + objects, scratch)
    for ours, wanted in zip(objects, files, strict=True):
        same_training(ours, wanted)
