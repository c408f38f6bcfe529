"""Schedules against closed forms and transformers; groups; every optimizer that torch has."""

import inspect
import math

import pytest
import torch
from torch import nn

from minitrain import load_config
from minitrain.training.checks import UNFIT_OPTIMIZERS
from minitrain.training.optim import build_optimizer, lr_factor, optimizer_class

BASE = {"datasets": [__file__.replace("test_optim.py", "../../example/data/skills-test.jsonl")]}


def config(*overrides):
    return load_config(BASE | {"model": {"name_or_path": "tiny"}}, list(overrides))


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_after_the_warm_up_the_schedule_is_that_of_transformers(shape):
    """transformers starts its warm-up at 0, which moves nothing; ours at 1/warmup. From the peak on they agree."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if shape == "constant" else shape
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=20)
    want = []
    for _ in range(20):
        want.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    got = [lr_factor(step, 20, 5, shape) for step in range(20)]
    assert got[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert got[5:] == pytest.approx(want[5:])


def test_the_schedule_is_its_closed_form():
    """Half way down the cosine is at 1/2, a line too; without warm-up the first step has the whole lr."""
    assert lr_factor(0, 10, 0, "linear") == 1
    assert lr_factor(5, 10, 0, "linear") == pytest.approx(0.5)
    assert lr_factor(5, 10, 0, "cosine") == pytest.approx(0.5)
    assert lr_factor(9, 10, 0, "cosine") == pytest.approx(0.5 * (1 + math.cos(0.9 * math.pi)))


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)


def test_norms_and_biases_are_not_decayed():
    """With a zero gradient one decayed step changes matrices only (transformers#35927)."""
    model = Small()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, config("lr=0.1", "weight_decay=0.5"))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"linear.weight"}


@pytest.mark.parametrize(
    "name",
    sorted(
        key
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and key not in UNFIT_OPTIMIZERS
    ),
)
def test_every_optimizer_of_torch_takes_a_step(name):
    """By name, whatever its capitals, with the options it has."""
    model = Small()
    before = model.linear.weight.detach().clone()
    optimizer = build_optimizer(model, config(f"optimizer={name.lower()}", "lr=0.1"))
    assert type(optimizer) is optimizer_class(name)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(before, model.linear.weight)


def test_more_arguments_reach_the_optimizer():
    """optimizer_args are passed on."""
    optimizer = build_optimizer(Small(), config("optimizer=SGD", "optimizer_args={momentum: 0.9}"))
    assert optimizer.defaults["momentum"] == 0.9
