"""Recomputation, offload, compiled blocks and FP8 on two ranks: the numbers of one process that uses none of them."""

import json

import pytest
from safetensors.torch import load_file

from minitrain.model.tiny import tiny_tokenizer
from tests.distributed.launch import launch
from tests.distributed.test_fsdp import figures, same_training
from tests.model.test_packed_hybrids import model_of

PACKED = ("packing=true", "gradient_accumulation_steps=2")
BUDGET = ("packing=true", "max_tokens_per_micro_batch=90")
LORA = ("lora.rank=4", "lora.dropout=0")
OFFLOAD = {"offload": True}
# Options, the kind of shards, the run on one process with the same numbers, and other keys of the job.
SETTINGS = {
    "selective": (("activation_checkpointing=selective", *BUDGET), "full", "plain", {}),
    "every-n": (("activation_checkpointing=2", *PACKED), "grad", "plain", {}),
    "offload": (("activation_checkpointing=full", *BUDGET), "full", "plain", OFFLOAD),
    "offload-lora": (("activation_checkpointing=selective", *LORA), "none", "lora", OFFLOAD),
    "deterministic": (("deterministic=true", "gradient_accumulation_steps=2"), "full", "plain", {}),
    "deterministic-lora": (("deterministic=true", *PACKED, *LORA), "none", "lora", {}),
}
COMPILED = {  # and at most this many graphs: in training, and in the checks before it
    "packed": (("activation_checkpointing=selective", *BUDGET), "full", "plain", 4),
    "lora": (("activation_checkpointing=full", *PACKED, *LORA), "none", "lora", 4),
    "hybrid": (PACKED, "grad", "hybrid", 6),
}


@pytest.fixture
def alone(job, tmp_path):
    """``alone("plain", "lora")``: runs on one process without any of the options."""

    def make(*names: str) -> dict[str, dict]:
        options = {"plain": (), "lora": LORA, "hybrid": (f"model.name_or_path={tmp_path / 'hybrid'}",)}
        return {name: job(f"alone-{name}", *options[name]) for name in names}

    return make


def test_options_of_memory_and_determinism(job, scratch, alone):
    """Gradients, losses and weights."""
    expected = alone("plain", "lora")
    ranked = {name: job(name, *options, fsdp=shard, **keys) for name, (options, shard, _, keys) in SETTINGS.items()}
    launch(0, list(expected.values()), scratch / "alone")
    launch(2, list(ranked.values()), scratch / "ranks")
    for name, (_, _, plain, _) in SETTINGS.items():
        same_training(ranked[name], expected[plain], rtol=2e-5)


@pytest.mark.slow(minutes=1)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_blocks(job, scratch, alone, tmp_path, name):
    """Each block is one graph, which runs without a compiler here: gradients, losses and weights."""
    model_of("mamba2").save_pretrained(tmp_path / "hybrid")
    tiny_tokenizer().save_pretrained(tmp_path / "hybrid")
    options, shard, plain, n_graphs = COMPILED[name]
    (expected,) = alone(plain).values()
    file = tmp_path / "graphs.json"
    ranked = job("compiled", *expected["overrides"], "compile=true", *options, fsdp=shard, compiled=str(file))
    launch(0, [expected], scratch / "alone")
    output = launch(2, [ranked], scratch / "ranks")
    same_training(ranked, expected, rtol=2e-5)
    assert "compile: blocks" not in output
    counts = json.loads(file.read_text())
    assert counts["graphs"] <= n_graphs and counts["calls"] >= 2 * 3 * 2, counts  # blocks, steps, micro-batches


@pytest.mark.slow(minutes=1)
def test_float8(job, scratch):
    """Each rank rounds the weights that it gathers: the numbers of one process in FP8, which are not those without."""
    pytest.importorskip("torchao.float8")
    plain, alone = job("plain", "packing=true"), job("alone", "packing=true", float8="rowwise")
    half = [
        job(f"half-{fsdp}", "packing=true", "model.policy_dtype=bfloat16", fsdp=fsdp, float8="rowwise")
        for fsdp in (None, "full")
    ]
    ranked = [job(shard, "packing=true", fsdp=shard, float8="rowwise") for shard in ("full", "none")]
    launch(0, [plain, alone, half[0]], scratch / "alone")
    launch(2, [*ranked, half[1]], scratch / "ranks")
    losses = {
        each["config"]["exp_name"]: [row["loss"] for row in figures(each)] for each in (plain, alone, *ranked, *half)
    }
    for name in ("full", "none"):
        assert losses[name] == pytest.approx(losses["alone"], rel=1e-3)
        assert losses[name] != pytest.approx(losses["plain"], rel=1e-2)
    assert losses["half-full"] == pytest.approx(losses["half-None"], rel=0.05)
    for ours in ranked:
        for name, gradient in load_file(alone["gradients"]).items():
            error = load_file(ours["gradients"])[name] - gradient
            assert error.norm() <= 1e-3 * gradient.norm(), name
