"""Sampling from a copy of the weights: the same responses in float32, measured differences in bfloat16."""

import json

import pytest
import torch

from minitrain import ConfigError
from minitrain.model.save import save_model
from minitrain.model.tiny import tiny_tokenizer
from tests.conftest import metrics, random_llama
from tests.messages import raises
from tests.rl.test_rounds import online  # noqa: F401 (a fixture)

LORA = {"rank": 4, "init": "gaussian"}
ADAPTERS = {"full": {}, "lora": {"lora": LORA}, "dora": {"lora": LORA | {"use_dora": True, "dropout": 0.1}}}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path) -> dict:
    save_model(random_llama(tie_word_embeddings=request.param), tiny_tokenizer(), tmp_path / "llama", torch.float32)
    return {"name_or_path": str(tmp_path / "llama")}


def answers(trainer) -> list[dict]:
    """The responses of all rounds."""
    files = sorted((trainer.run.path / "rollouts").iterdir())
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_copy_in_float32_samples_the_same(online, model, adapter):  # noqa: F811
    """Over several rounds of changing weights: text, rewards and gradients. Afterwards it has no memory."""
    options = {"n_steps": 4, "model": model, "lr": 1e-2} | ADAPTERS[adapter]
    rollout = {"num_iterations": 2, "save_samples": -1, "rewards": [{"name": "regex", "pattern": ".*[a-m].*"}]}
    plain = online("plain", rollout, **options)
    plain.train()
    copied = online("copied", rollout | {"sampler_dtype": "float32"}, **options)
    copied.train()
    ours, theirs = answers(copied), answers(plain)
    assert len(ours) == 2 * 4 * 4 and len({one["reward"] for one in ours}) > 1
    assert [(one["messages"], one["reward"]) for one in ours] == [(one["messages"], one["reward"]) for one in theirs]
    norms = [[row["grad_norm"] for row in metrics(trainer)] for trainer in (copied, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    parameters = list(copied.train_loader.engine.sampler.policy.parameters())
    assert parameters and all(parameter.untyped_storage().nbytes() == 0 for parameter in parameters)


def test_the_mismatch_of_a_copy_in_bfloat16_is_measured(online):  # noqa: F811
    """Also in rounds of one step, where the policy alone would need no second pass; the correction sees it."""
    trainer = online("bf16", {"sampler_dtype": "bfloat16", "importance_correction": "tis"}, log_every_steps=1)
    trainer.train()
    dtypes = {parameter.dtype for parameter in trainer.train_loader.engine.sampler.policy.parameters()}
    assert dtypes == {torch.bfloat16} and {parameter.dtype for parameter in trainer.parameters} == {torch.float32}
    rows = [row for row in metrics(trainer, "rollout") if "mismatch" in row]
    assert len(rows) == 2 and all(1e-5 < row["mismatch"] < 0.05 for row in rows)
    weights = trainer.train_loader.examples.caches[0].token_features["importance_weights"]
    assert not torch.equal(weights, torch.ones_like(weights))


def test_an_adapter_of_the_embeddings_is_refused(online):  # noqa: F811
    lora = LORA | {"target_modules": ["embed_tokens", "q_proj"]}
    with raises(ConfigError, "conflict", "rollout.sampler_dtype"):
        online("adapted", {"sampler_dtype": "float32"}, lora=lora)
