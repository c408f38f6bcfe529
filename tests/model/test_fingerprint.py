"""No two models pass for the same one: caches of what a model computed, and resuming, see every tensor."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitrain.config.sections import ModelConfig
from minitrain.model import fingerprint as module
from minitrain.model.fingerprint import model_fingerprint
from minitrain.model.save import save_model
from minitrain.model.tiny import tiny_tokenizer
from tests.conftest import random_llama


@pytest.fixture
def deep(tmp_path):
    """A model of 5 MB, so that most of it is neither in its first nor in its last MiB."""
    model = random_llama(hidden_size=64, intermediate_size=256, num_hidden_layers=20)
    save_model(model, tiny_tokenizer(), tmp_path / "deep", torch.float32)
    return tmp_path / "deep"


def edit(folder, name: str) -> None:
    """Changes one tensor of a model as a step of training does: a little, everywhere."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name] + 0.05
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("is_sampled", [False, True])
def test_every_tensor_is_seen(deep, monkeypatch, is_sampled):
    """Whichever tensor differs, in full and by samples; the same files in another folder are the same."""
    if is_sampled:
        monkeypatch.setattr(module, "MAX_FULL_BYTES", 0)
    config = ModelConfig(name_or_path=str(deep))
    seen, before = {tuple(model_fingerprint(config))}, (deep / "model.safetensors").read_bytes()
    names = list(load_file(deep / "model.safetensors"))
    for name in names:
        edit(deep, name)
        seen.add(tuple(model_fingerprint(config)))
        (deep / "model.safetensors").write_bytes(before)
    assert len(seen) == len(names) + 1
    other = shutil.copytree(deep, deep.parent / "other")
    assert model_fingerprint(ModelConfig(name_or_path=str(other))) == model_fingerprint(config)


def test_other_files_are_seen(deep):
    """config.json, an archive and an adapter change it too."""
    config = ModelConfig(name_or_path=str(deep))
    seen = [
        model_fingerprint(config),
        model_fingerprint(ModelConfig(name_or_path=str(deep), archive=str(deep / "model.safetensors"))),
    ]
    text = (deep / "config.json").read_text()
    (deep / "config.json").write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    seen.append(model_fingerprint(config))
    assert len({tuple(one) for one in seen}) == 3
    assert model_fingerprint(ModelConfig(name_or_path="tiny")) == []


def test_a_hub_model_is_seen(deep, tmp_path, monkeypatch):
    """By the files of its snapshot in the cache, those of the revision that is asked for."""
    repository = tmp_path / "hub" / "models--me--deep"
    for revision in ("a" * 40, "b" * 40):
        shutil.copytree(deep, repository / "snapshots" / revision)
    edit(repository / "snapshots" / ("b" * 40), "model.layers.15.mlp.up_proj.weight")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = [model_fingerprint(ModelConfig(name_or_path="me/deep", revision=revision * 40)) for revision in "ab"]
    assert found[0] == model_fingerprint(ModelConfig(name_or_path=str(deep))) and found[1] != found[0]


@pytest.fixture
def dpo(make_trainer, tmp_path):
    """A trainer of pairs with a precomputed reference."""
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}", "chosen": "ab", "rejected": "c"}) + "\n" for i in range(9)))
    options = (f"datasets=[{rows}]", "loss.name=dpo", "loss.reference=precomputed", "model.policy_dtype=float32")

    def train(*more: str) -> float:
        trainer = make_trainer(*options, "n_steps=1", *more)
        trainer.train()
        return trainer.train_metrics["loss"]

    return train


def test_references_of_another_model_are_not_reused(deep, dpo):
    """Two models that differ in a block in the middle: the first loss is ln 2 for both (trl#6443)."""
    assert dpo(f"model.name_or_path={deep}", "exp_name=one") == pytest.approx(math.log(2), abs=1e-6)
    edit(deep, "model.layers.15.mlp.down_proj.weight")
    assert dpo(f"model.name_or_path={deep}", "exp_name=two") == pytest.approx(math.log(2), abs=1e-6)


def test_a_batch_of_cached_references_is_compared(deep, dpo, monkeypatch):
    """Even if two models had the same identity, log-probabilities that are not the policy's would be made again."""
    monkeypatch.setattr("minitrain.training.aux_models.model_fingerprint", lambda config: [])
    assert dpo(f"model.name_or_path={deep}", "exp_name=one") == pytest.approx(math.log(2), abs=1e-6)
    edit(deep, "model.layers.15.mlp.down_proj.weight")
    assert dpo(f"model.name_or_path={deep}", "exp_name=two") == pytest.approx(math.log(2), abs=1e-6)
