"""`deterministic`: settings and their restoration, and the check that a step computed twice gives the same bits."""

import itertools
import os

import pytest
import torch

from minitrain import ConfigError, RunError
from minitrain.cli.main import main
from minitrain.training.determinism import deterministic_algorithms
from tests.conftest import metrics, weights
from tests.messages import raises


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


OPTIONS = [
    (),
    ("lora.rank=4", "lora.dropout=0.3", "packing=true"),
    ("model.policy_dtype=bfloat16", "model.master_weights=optimizer"),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_check_changes_no_number(make_trainer, options):
    """With dropout, too: the random numbers of the first step are not those of the check."""
    plain = make_trainer("exp_name=plain", *options)
    plain.train()
    seen = []
    checked = make_trainer("deterministic=true", *options, on_step_end=lambda _: seen.append(settings()))
    before = settings()
    checked.train()
    assert seen == [(True, True, False)] * 3 and settings() == before != seen[0]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert [row["loss"] for row in metrics(checked)] == [row["loss"] for row in metrics(plain)]
    expected = weights(plain)
    assert all(torch.equal(value, expected[name]) for name, value in weights(checked).items())


def settings() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark


def test_a_gradient_that_differs_is_named(make_trainer, wording):
    trainer, numbers = make_trainer("deterministic=true"), itertools.count()
    name, parameter = list(trainer.policy.named_parameters())[3]
    parameter.register_hook(lambda gradient: gradient + next(numbers) * 1e-6)
    with raises(RunError, "mismatch", name) as error:
        trainer.train()
    wording(str(error.value))
    assert trainer.step == 0 and not torch.are_deterministic_algorithms_enabled()


def test_a_loss_that_differs_is_reported(make_trainer, monkeypatch, wording):
    trainer, numbers = make_trainer("deterministic=true"), itertools.count()
    compute = type(trainer.loss).__call__

    def drifting(*args):
        output = compute(*args)
        output.loss_sum = output.loss_sum * (1 + next(numbers))
        return output

    monkeypatch.setattr(type(trainer.loss), "__call__", drifting)
    with raises(RunError, "mismatch", "loss") as error:
        trainer.train()
    wording(str(error.value))


def test_an_operation_without_deterministic_implementation(wording):
    with raises(ConfigError, "unsupported-model", "histc") as error, deterministic_algorithms(True):
        raise RuntimeError("_histc_cuda does not have a deterministic implementation, but you set 'torch...'")
    wording(str(error.value))
    with pytest.raises(RuntimeError, match="other"), deterministic_algorithms(True):
        raise RuntimeError("other")


@pytest.mark.parametrize("given", [None, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_segments_expand_unless_the_user_says_otherwise(monkeypatch, given, capsys):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    if given:
        monkeypatch.setenv(given, "max_split_size_mb:64")
    main(["doctor", "nowhere"])
    wanted = {None: "expandable_segments:True", "PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}
    assert os.environ.get("PYTORCH_ALLOC_CONF") == wanted.get(given)
