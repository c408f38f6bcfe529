"""Models that are written while training goes on, without what it takes to resume."""

import json
import os
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM

from minitrain import ConfigError, RunError
from minitrain.training.atomic_dir import checkpoints
from tests.conftest import weights
from tests.messages import raises

EVERY = ("n_steps=7", "save_models_every_steps=2")


def models(trainer) -> list[str]:
    return [path.name for path in checkpoints(trainer.run.models)]


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_are_as_the_umask_says(make_trainer, tmp_path, monkeypatch, umask):
    """Models, adapters, checkpoints, token caches and precomputed references."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = tmp_path / "pairs.jsonl"
    options = (f"datasets=[{rows}]", "loss.name=dpo", "loss.reference=precomputed", "save_every_steps=2")
    before = os.umask(umask)
    try:
        row = {"prompt": "a", "chosen": "b", "rejected": "c"}
        rows.write_text("".join(json.dumps(row | {"prompt": str(i)}) + "\n" for i in range(9)))
        make_trainer(*options, "exp_name=whole").train()
        make_trainer(*options, "exp_name=part", "lora.rank=2").train()
    finally:
        os.umask(before)
    modes = {str(file): oct(file.stat().st_mode & 0o777) for file in tmp_path.rglob("*") if file.is_file()}
    assert len([name for name in modes if name.endswith(".safetensors")]) > 6
    assert {name: mode for name, mode in modes.items() if mode != oct(0o666 & ~umask)} == {}


@pytest.mark.parametrize("keep, left", [(None, ["step-2", "step-4", "step-6"]), (2, ["step-4", "step-6"])])
def test_models_of_steps_on_the_way(make_trainer, keep, left):
    """Each is what the weights were then, as transformers loads them; keep_models counts; no optimizer is written."""
    seen = {}
    note = {"on_step_end": lambda t: seen.update({t.step: weights(t)})}
    trainer = make_trainer(*EVERY, *([f"keep_models={keep}"] if keep else []), **note)
    trainer.train()
    assert models(trainer) == left and not trainer.run.checkpoints.exists()
    loaded = AutoModelForCausalLM.from_pretrained(trainer.run.model(4))
    assert all(torch.equal(p, seen[4][f"model.{name}"]) for name, p in loaded.named_parameters())
    assert sorted(p.name for p in trainer.run.model(4).iterdir()) == sorted(p.name for p in trainer.run.final.iterdir())


def test_the_last_step_is_final_alone(make_trainer):
    """A model of the last step would be final/ once more."""
    trainer = make_trainer("n_steps=4", "save_models_every_steps=2")
    trainer.train()
    assert models(trainer) == ["step-2"] and trainer.run.final.exists()


def test_a_run_that_starts_anew_drops_the_models_of_the_one_before(make_trainer):
    """One that was killed without a checkpoint leaves models; those of steps to come would be taken for newer ones."""

    def die(trainer):
        if trainer.step == 6:
            raise KeyError("killed")

    options = (*EVERY, "keep_models=1", "log_every_steps=1")
    with pytest.raises(KeyError):
        make_trainer(*options, on_step_end=die).train()
    seen = []
    make_trainer(*options, on_step_end=lambda t: seen.append(models(t))).train()
    assert seen[0] == [] and seen[2] == ["step-2"] and seen[6] == ["step-6"]


def test_a_run_that_goes_on_keeps_them(make_trainer):
    """Models up to the checkpoint stay, and other options than theirs are refused though there is no checkpoint."""

    def stop(trainer):
        if trainer.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    make_trainer(*EVERY, on_step_end=stop).train()
    again = make_trainer(*EVERY)
    again.train()
    assert again.checkpoint.name == "step-5" and models(again) == ["step-2", "step-4", "step-6"]
    with raises(RunError, "other-run", "lr: 0.01 -> 0.02"):
        make_trainer(*EVERY, "lr=0.02")


def test_models_without_a_checkpoint_belong_to_their_options(make_trainer):
    """Other options do not write over the models of a run that was killed."""

    def die(trainer):
        if trainer.step == 3:
            raise KeyError("killed")

    with pytest.raises(KeyError):
        make_trainer(*EVERY, on_step_end=die).train()
    with raises(RunError, "other-run", "lr: 0.01 -> 0.02"):
        make_trainer(*EVERY, "lr=0.02")


def test_adapters_and_their_retention(make_trainer):
    """With LoRA each folder holds the adapter alone; keep_models by itself is told."""
    trainer = make_trainer(*EVERY, "lora.rank=2")
    trainer.train()
    assert (trainer.run.model(2) / "adapter_model.safetensors").exists()
    assert not (trainer.run.model(2) / "model.safetensors").exists()
    with raises(ConfigError, "no-effect", "keep_models: "):
        make_trainer("keep_models=2")
