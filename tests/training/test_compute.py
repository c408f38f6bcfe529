"""policy_dtype=auto, and the lines about how a run computes, with a CUDA device that only seems to be there."""

import pytest
import torch

from minitrain import RunError
from minitrain.config.schema import Config
from minitrain.config.sections import ModelConfig
from minitrain.training.compute import speed_hints, with_dtype
from tests.messages import raises

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def card(monkeypatch):
    """``card(True)``: the GPU computes in bfloat16."""
    return lambda has: monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has)


@pytest.mark.parametrize(
    ("given", "device", "has_bfloat16", "wanted"),
    [
        ("auto", CPU, False, "float32"),
        ("auto", CUDA, True, "bfloat16"),
        ("auto", CUDA, False, "float32"),
        ("float32", CUDA, True, "float32"),
        ("float16", CPU, False, "float16"),
    ],
)
def test_the_dtype_of_a_device(card, given, device, has_bfloat16, wanted):
    card(has_bfloat16)
    config = Config(model=ModelConfig("tiny", policy_dtype=given))
    assert with_dtype(config, device).model.policy_dtype == wanted
    assert config.model.policy_dtype == given


def test_auto_is_saved_as_the_dtype_and_compared_at_resume(make_trainer, monkeypatch):
    """A run of a CPU is not resumed in bfloat16 unless one asks for it; 0.1.0 wrote float32."""
    trainer = make_trainer("model.policy_dtype=auto", "save_every_steps=1", "n_steps=1")
    trainer.train()
    assert trainer.config.model.policy_dtype == "float32"
    assert "policy_dtype: float32" in (trainer.run.path / "config.yml").read_text()
    make_trainer("model.policy_dtype=auto", "n_steps=2").train()
    monkeypatch.setattr("minitrain.training.learning_rate.with_dtype", lambda config, device: with_dtype(config, CUDA))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    with raises(RunError, "other-run", "model.policy_dtype", '"float32" -> "bfloat16"'):
        make_trainer("model.policy_dtype=auto", "n_steps=3")


def test_the_first_lines_name_how_a_run_computes(make_trainer, capsys):
    make_trainer("activation_checkpointing=2", "packing=true", "n_steps=1").train()
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "compute: " in line]
    for word in ("float32", "sdpa_documents", "not compiled", "activation_checkpointing 2"):
        assert word in line
    assert "usually faster" not in printed  # on a CPU


def test_hints_on_a_gpu(card, monkeypatch):
    """Only what is left unused, and TF32 only where the products are slow without it."""
    card(True)
    plain = Config(model=ModelConfig("tiny", policy_dtype="float32"))
    dtype, *rest = speed_hints(plain, CUDA)
    assert "model.policy_dtype=bfloat16" in dtype and "set_float32_matmul_precision" in dtype
    assert rest == ["compile=true", "packing=true"]
    fast = Config(model=ModelConfig("tiny", policy_dtype="bfloat16"), compile=True, packing=True)
    assert speed_hints(fast, CUDA) == [] == speed_hints(plain, CPU)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert speed_hints(plain, CUDA) == rest
    monkeypatch.undo()
    card(False)
    assert speed_hints(plain, CUDA)[0] == "model.policy_dtype=float16"
