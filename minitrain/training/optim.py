"""Optimizers by name, and parameter groups."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from minitrain.config.issues import format_value
from minitrain.config.python_objects import PythonObject, find_object, python_object
from minitrain.config.schema import Config
from minitrain.errors import ConfigError

FASTER = ("lora_B", "lora_embedding_B")  # by lora.loraplus_lr_ratio


def optimizer_class(name: str, unfit: set[str] = frozenset()) -> type[torch.optim.Optimizer]:
    """Return a class of torch.optim by its case-insensitive name. Raise ConfigError for an unknown name."""
    classes = {
        key: value
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and key not in unfit
    }
    chosen = {key.lower(): value for key, value in classes.items()}.get(name.lower())
    if chosen is None:
        raise ConfigError(
            f"{name!r} is not a supported class of torch.optim. Use one of {', '.join(sorted(classes))}.",
            "not-a-choice",
        )
    return chosen


def accepted_options(chosen: type[torch.optim.Optimizer]) -> list[str]:
    """Return the names of an optimizer's options. `eps` is left out where it has another meaning than in Adam."""
    names = list(inspect.signature(chosen).parameters)
    return names if "betas" in names else [name for name in names if name != "eps"]


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Build the optimizer over all trained parameters. Weight decay applies to those with two or more dimensions."""
    if given := find_object(config.optimizer):
        return _call_factory(given.value, model, config)
    chosen = optimizer_class(config.optimizer)
    accepted = accepted_options(chosen)
    fused = "betas" in accepted  # for sharded parameters, PyTorch has a fused step for Adam only
    options = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps, "fused": fused}
    arguments = {key: value for key, value in options.items() if key in accepted} | config.optimizer_args
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ratio = config.lora.loraplus_lr_ratio if name.endswith(FASTER) else 1.0
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((ratio, decay), []).append(parameter)
    try:
        optimizer = chosen([{"params": each} for each in groups.values()], **arguments)
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        raise ConfigError(
            f"optimizer: {chosen.__name__} rejects its options ({error}). Change optimizer_args.", "invalid-value"
        ) from None
    for group, (ratio, decay) in zip(optimizer.param_groups, groups, strict=True):
        group["lr_ratio"] = ratio
        if "weight_decay" in accepted:
            group["weight_decay"] = decay
    return optimizer


def optimizer_object(factory: Any) -> PythonObject:
    """Wrap a function that builds an optimizer, so that a config can refer to it. Raise ConfigError."""
    if isinstance(factory, (torch.optim.Optimizer, str)) or not callable(factory):
        raise ConfigError(
            f"optimizer: expected a function of the list of trained parameters, got {format_value(factory)}. "
            "Pass, for example, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), or set the name of "
            "a class of torch.optim in the config.",
            "wrong-type",
        )
    function = getattr(factory, "func", factory)  # unwrap a functools.partial
    name = getattr(function, "__qualname__", type(function).__qualname__)
    options = ", ".join(f"{key}={value!r}" for key, value in getattr(factory, "keywords", {}).items())
    module = getattr(function, "__module__", type(function).__module__)
    return python_object(factory, "optimizer", f"optimizer {module}.{name}({options})")


def _call_factory(factory: Callable, model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Return the optimizer that a user's function builds. The lr of each parameter group is its peak."""
    try:
        optimizer = factory([parameter for parameter in model.parameters() if parameter.requires_grad])
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        raise ConfigError(
            f"optimizer: the function failed: {type(error).__name__}: {error}", "invalid-value"
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        name = type(optimizer).__name__
        raise ConfigError(f"optimizer: the function returned {name}. Return a torch.optim.Optimizer.", "wrong-type")
    for group in optimizer.param_groups:
        group["lr_ratio"] = group["lr"] / config.lr if config.lr else 0.0
    return optimizer


def check_optimizer(config: Config) -> None:
    """Raise ConfigError for options that the optimizer rejects, by building it over a small layer."""
    build_optimizer(nn.Linear(1, 1), config)


def warmup_steps(config: Config, total: int) -> int:
    """Return the number of warmup steps. Raise ConfigError if the learning rate would not reach its peak."""
    if config.warmup_steps > total:
        raise ConfigError(
            f"warmup_steps: {config.warmup_steps} is more than the {total} steps of n_epochs={config.n_epochs:g}. "
            "Lower it, or use warmup_ratio.",
            "out-of-range",
        )
    return config.warmup_steps or round(config.warmup_ratio * total)
