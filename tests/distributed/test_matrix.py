"""Every registered loss trains every kind of parameters on one process and on two ranks, and they agree.

Found by iterating over the registry, so that a new loss cannot escape it.
"""

import json
import math
from pathlib import Path

import pytest

from minitrain.losses import registered
from tests.distributed.launch import launch
from tests.distributed.test_fsdp import figures, same_training
from tests.messages import reports
from tests.rows import REQUIRED, ROWS

TUNINGS = {"full": (), "lora": ("lora.rank=4",), "qlora": ("lora.rank=4", "model.quantization=4bit")}


@pytest.fixture
def jobs(job, tmp_path):
    """``jobs("dpo", "lora", fsdp="full")``: a job of three steps with an evaluation."""

    def make(name: str, tuning: str, **where) -> dict:
        kind = registered()[name].example_type
        file = tmp_path / f"{kind}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
        options = [f"loss.{key}={value}" for key, value in REQUIRED.get(name, {}).items()]
        settings = (f"datasets=[{file}]", f"loss.name={name}", "validation_split=5", "eval_batch_size=2", *options)
        where_to = f"{name}-{tuning}-{where.get('fsdp', 'alone')}"
        return job(where_to, *settings, *TUNINGS[tuning], **where)

    return make


@pytest.mark.parametrize("name", registered())
def test_every_loss(jobs, scratch, name):
    """Full and LoRA training under FSDPTrainer is that of BasicTrainer, evaluation too; QLoRA trains on one device."""
    alone = {tuning: jobs(name, tuning) for tuning in ("full", "lora")}
    ranked = {tuning: jobs(name, tuning, fsdp="full") for tuning in ("full", "lora")}
    launch(0, [*alone.values(), jobs(name, "qlora")], scratch / "alone")
    launch(2, list(ranked.values()), scratch / "ranks")
    for tuning, wanted in alone.items():
        same_training(ranked[tuning], wanted, rtol=2e-5)
        ours, theirs = (figures(each, "eval")[-1] for each in (ranked[tuning], wanted))
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"seconds", "kind"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("name", registered())
def test_what_is_refused(jobs, scratch, name):
    """Quantised weights under FSDPTrainer: a clear error in the place of a wrong training."""
    wrong = jobs(name, "qlora", fsdp="full")
    output = launch(2, [wrong], scratch, expect=2)
    assert reports(output, "conflict", "model.quantization: ")
    assert not Path(wrong["trace"]).exists()


def test_references_on_two_ranks(job, scratch, tmp_path):
    """A reference of each kind, with shared prompts: the first loss is ln 2, and all train what one process trains."""
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS["preference"]))
    settings = (f"datasets=[{file}]", "loss.name=dpo", "packing=true", "gradient_accumulation_steps=2")
    alone = job("alone", *settings)
    ranked = [job(kind, *settings, f"loss.reference={kind}", fsdp="full") for kind in ("model", "adapter")]
    ranked += [job(f"noted-{shard}", *settings, "loss.reference=precomputed", fsdp=shard) for shard in ("grad", "none")]
    launch(0, [alone], scratch / "alone")
    launch(2, ranked, scratch / "ranks")
    for ours in ranked:
        same_training(ours, alone, rtol=2e-5)
        assert figures(ours)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
