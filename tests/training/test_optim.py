"""Schedules against closed forms and transformers; groups; every optimizer that torch has."""

import inspect
import math
from dataclasses import fields

import pytest
import torch
from torch import nn

from minitrain import load_config
from minitrain.config.schedules import BOUNDS, CHOICES, SCHEDULES, argument_problems, lr_factor
from minitrain.config.schema import Config
from minitrain.errors import InvalidConfigError
from minitrain.training.optim import UNFIT, build_optimizer, optimizer_class

BASE = {"datasets": [__file__.replace("test_optim.py", "../../example/data/skills-test.jsonl")]}


def config(*overrides):
    return load_config(BASE | {"model": {"name_or_path": "tiny"}, "lr": 2e-5}, list(overrides))


# The schedule of transformers that each of ours is, and sets of arguments for 20 steps at a peak of 0.02.
OF_TRANSFORMERS = {
    "linear": ("linear", [{}]),
    "cosine": ("cosine", [{}, {"num_cycles": 1.25}]),
    "cosine_with_min_lr": (
        "cosine_with_min_lr",
        [{"min_lr_rate": 0.1}, {"min_lr": 0.005, "num_cycles": 0.75}, {"min_lr_rate": 0}],
    ),
    "cosine_with_restarts": ("cosine_with_restarts", [{}, {"num_cycles": 3}]),
    "polynomial": ("polynomial", [{}, {"lr_end": 0.002, "power": 2.5}]),
    "inverse_sqrt": ("inverse_sqrt", [{}, {"timescale": 40}]),
    "constant": ("constant_with_warmup", [{}]),
    "wsd": (
        "warmup_stable_decay",
        [
            {"num_decay_steps": 6, "decay_type": "linear"},
            {"num_decay_steps": 7, "decay_type": "cosine", "min_lr_ratio": 0.1, "num_cycles": 0.6},
            {"num_decay_steps": 5, "decay_type": "1-sqrt", "min_lr_ratio": 0.2},
        ],
    ),
}
SETS = [(name, arguments) for name, (_, sets) in OF_TRANSFORMERS.items() for arguments in sets]


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize(("shape", "arguments"), SETS, ids=str)
def test_after_the_warm_up_the_schedule_is_that_of_transformers(shape, arguments, warmup):
    """transformers starts its warm-up at 0, which moves nothing; ours at 1/warmup. From the peak on they agree."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.02)
    scheduler = get_scheduler(OF_TRANSFORMERS[shape][0], optimizer, warmup, 20, scheduler_specific_kwargs=arguments)
    want = []
    for _ in range(20):
        want.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    got = [0.02 * lr_factor(step, 20, warmup, shape, None, arguments, 0.02) for step in range(20)]
    assert got[:warmup] == pytest.approx([0.02 * share for share in (0.2, 0.4, 0.6, 0.8, 1.0)[:warmup]])
    assert got[warmup:] == pytest.approx(want[warmup:])


def test_every_argument_of_a_schedule_is_compared_and_has_bounds():
    """The sets above use each argument, with a default that transformers has too, except that wsd decays linearly."""
    for name, one in SCHEDULES.items():
        used = {key for arguments in OF_TRANSFORMERS[name][1] for key in arguments}
        assert used == set(one.arguments)
        assert not list(argument_problems(name, OF_TRANSFORMERS[name][1][-1], 1.0))
    assert set(BOUNDS) | set(CHOICES) == {key for one in SCHEDULES.values() for key in one.arguments}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("lr_scheduler_args={num_cycles: 2}",), ("lr_scheduler_args.num_cycles", "unknown-option")),
        (("lr_scheduler=cosine", "lr_scheduler_args={min_lr: 0}"), ("lr_scheduler_args.min_lr", "unknown-option")),
        (("lr_scheduler=cosine", "lr_scheduler_args={num_cycles: a}"), ("lr_scheduler_args.num_cycles", "wrong-type")),
        (
            ("lr_scheduler=cosine", "lr_scheduler_args={num_cycles: yes}"),
            ("lr_scheduler_args.num_cycles", "wrong-type"),
        ),
        (
            ("lr_scheduler=cosine", "lr_scheduler_args={num_cycles: -1}"),
            ("lr_scheduler_args.num_cycles", "out-of-range"),
        ),
        (("lr_scheduler=cosine_with_min_lr",), ("lr_scheduler_args", "missing-option")),
        (
            ("lr_scheduler=cosine_with_min_lr", "lr_scheduler_args={min_lr: 0, min_lr_rate: 0}"),
            ("lr_scheduler_args", "missing-option"),
        ),
        (
            ("lr_scheduler=cosine_with_min_lr", "lr_scheduler_args={min_lr: 0.2}", "lr=0.1"),
            ("lr_scheduler_args.min_lr", "out-of-range"),
        ),
        (("lr_scheduler=polynomial", "lr=1e-8"), ("lr_scheduler_args.lr_end", "out-of-range")),
        (
            ("lr_scheduler=wsd", "lr_scheduler_args={decay_type: square}"),
            ("lr_scheduler_args.decay_type", "not-a-choice"),
        ),
        (("lr_scheduler=wsd", "lr_scheduler_args={num_cycles: 1}"), ("lr_scheduler_args.num_cycles", "no-effect")),
        (
            ("lr_scheduler=wsd", "lr_scheduler_args={num_decay_steps: 2}", "lr_decay_ratio=0.1"),
            ("lr_decay_ratio", "conflict"),
        ),
    ],
    ids=str,
)
def test_arguments_that_a_schedule_cannot_use(options, problem):
    with pytest.raises(InvalidConfigError) as caught:
        config(*options)
    assert [(issue.key, issue.code) for issue in caught.value.issues] == [problem]


def test_the_floor_of_a_cosine_reaches_the_optimizer(make_trainer):
    """With the lr of the config as the peak."""
    lrs = []
    options = ("n_steps=4", "lr=0.02", "lr_scheduler=cosine_with_min_lr", "lr_scheduler_args={min_lr: 0.01}")
    make_trainer(*options, on_step_end=lambda t: lrs.append(t.optimizer.param_groups[0]["lr"])).train()
    assert lrs == pytest.approx([0.015 + 0.005 * math.cos(math.pi * step / 4) for step in range(4)])


def test_the_schedule_is_its_closed_form():
    """Half way down the cosine is at 1/2, a line too; without warm-up the first step has the whole lr."""
    assert lr_factor(0, 10, 0, "linear") == 1
    assert lr_factor(5, 10, 0, "linear") == pytest.approx(0.5)
    assert lr_factor(5, 10, 0, "cosine") == pytest.approx(0.5)
    assert lr_factor(9, 10, 0, "cosine") == pytest.approx(0.5 * (1 + math.cos(0.9 * math.pi)))


def test_wsd_falls_in_the_last_tenth_of_the_steps():
    """And sooner after a long warm-up, so that it has its peak; a share of one step has no decay."""
    assert [lr_factor(step, 40, 0, "wsd") for step in (0, 36, 37, 38, 39)] == [1, 1, 0.75, 0.5, 0.25]
    assert [lr_factor(step, 10, 8, "wsd", 0.5) for step in (7, 8, 9)] == [1, 1, 0.5]
    assert [lr_factor(step, 4, 0, "wsd", 0.1) for step in range(4)] == [1, 1, 1, 1]


def test_a_decay_without_a_schedule_that_decays():
    with pytest.raises(InvalidConfigError) as caught:
        config("lr_decay_ratio=0.2", "lr_scheduler=cosine")
    assert [(issue.key, issue.code) for issue in caught.value.issues] == [("lr_decay_ratio", "no-effect")]
    assert config("lr_decay_ratio=0.2", "lr_scheduler=wsd").lr_decay_ratio == 0.2


def test_each_schedule_is_a_choice_with_its_help():
    option = {f.name: f.metadata for f in fields(Config)}["lr_scheduler"]
    assert option["choices"] == tuple(SCHEDULES) == tuple(OF_TRANSFORMERS)
    assert all(f"{name}: {one.help}" in option["help"] for name, one in SCHEDULES.items())


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
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and key not in UNFIT
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
