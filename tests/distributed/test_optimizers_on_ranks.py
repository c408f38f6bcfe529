"""Each optimizer on two ranks trains as on one process, and resumes to the bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minitrain.model.save import save_model
from minitrain.model.tiny import tiny_tokenizer
from tests.conftest import random_llama
from tests.distributed.launch import launch, trace

IN_BACKWARD = ("optimizer_in_backward=true", "max_grad_norm=0")
ROUNDING = ("model.policy_dtype=bfloat16", "model.master_dtype=bfloat16")
# Options, the kind of shards, and how far weights may be from those of one process after three steps.
SETTINGS = {"muon": ((*IN_BACKWARD, "optimizer=Muon"), "full", 2e-2)}  # it multiplies in bfloat16
OF_EXTRAS = {
    "muon-none": (("optimizer=Muon",), "none", 2e-2),
    "backward": (IN_BACKWARD, "grad", 5e-4),
    "backward-none": (IN_BACKWARD, "none", 5e-4),
    "bitsandbytes": ((*IN_BACKWARD, "optimizer=bitsandbytes.AdamW8bit"), "full", 5e-2),
    "torchao": (("optimizer=torchao.AdamW8bit",), "full", 5e-2),
    "rounding": (
        ("optimizer=torchao.AdamW4bit", "optimizer_args={bf16_stochastic_round: true}", *ROUNDING),
        "full",
        0.2,
    ),
}


def final(job: dict) -> dict[str, torch.Tensor]:
    return load_file(Path(job["config"]["output_dir"]) / job["config"]["exp_name"] / "final" / "model.safetensors")


def trains_as_alone(settings: dict, job, scratch: Path, *common: str) -> dict[str, dict]:
    """Compare each setting on two ranks with one process, and with a run in two parts. Return the latter."""

    def make(kind: str, name: str, *more: str) -> dict:
        options, fsdp, _ = settings[name]
        shared = (*common, "lr_scheduler=constant", "n_steps=3", "save_every_steps=1", *options, *more)
        made = job(f"{kind}-{name}", *shared, fsdp=None if kind == "alone" else fsdp)
        return {key: value for key, value in made.items() if key not in ("gradients", "ended")}

    alone, whole, half, rest = [
        {name: make(kind, name, *more) for name in settings}
        for kind, *more in (("alone",), ("whole",), ("parts", "n_steps=1"), ("parts",))
    ]
    launch(0, list(alone.values()), scratch / "alone")
    launch(2, [*whole.values(), *half.values(), *rest.values()], scratch / "ranks")
    for name, (_, _, tolerance) in settings.items():
        assert trace(Path(whole[name]["trace"])) == trace(Path(rest[name]["trace"])), name
        ranked = final(whole[name])
        for key, weight in final(alone[name]).items():
            distance = (ranked[key].float() - weight.float()).abs()
            assert distance.max() <= tolerance and distance.mean() <= tolerance / 10, (name, key)
    return rest


def test_muon_in_the_backward_pass(job, scratch):
    trains_as_alone(SETTINGS, job, scratch)


@pytest.mark.slow(minutes=1)
def test_quantized_states_are_those_of_a_ranks_rows(job, scratch, tmp_path):
    """Blocks of 256 values are within a row of 256, as on one process; another number of ranks is refused."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")
    save_model(random_llama(hidden_size=256), tiny_tokenizer(), tmp_path / "model", torch.float32)
    parts = trains_as_alone(OF_EXTRAS, job, scratch, f"model.name_or_path={tmp_path / 'model'}")["torchao"]
    parts["config"]["trainer"], parts["config"]["fsdp"] = "BasicTrainer", {}
    parts["overrides"].append("n_steps=4")
    assert "[mismatch]" in launch(0, [parts], scratch / "fewer", expect=2)
