"""Optimizers by name, and parameter groups."""

import inspect

import torch
from torch import nn

from minitrain.config.schema import Config
from minitrain.errors import ConfigError

FASTER = ("lora_B", "lora_embedding_B")  # by lora.loraplus_lr_ratio


def optimizer_class(name: str, unfit: set[str] = frozenset()) -> type[torch.optim.Optimizer]:
    """A class of torch.optim by name, whatever its capitals. Raises ConfigError for an unknown one."""
    classes = {
        key: value
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and key not in unfit
    }
    chosen = {key.lower(): value for key, value in classes.items()}.get(name.lower())
    if chosen is None:
        raise ConfigError(
            f"torch.optim has no {name!r} that can be used; there are {', '.join(sorted(classes))}.", "not-a-choice"
        )
    return chosen


def accepted_options(chosen: type[torch.optim.Optimizer]) -> list[str]:
    """The options of an optimizer by name; `eps` only where it is Adam's, since others mean other things by it."""
    names = list(inspect.signature(chosen).parameters)
    return names if "betas" in names else [name for name in names if name != "eps"]


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimizer over all trained parameters; only those with two or more dimensions are decayed."""
    chosen = optimizer_class(config.optimizer)
    accepted = accepted_options(chosen)
    fused = "betas" in accepted  # of sharded parameters, PyTorch has Adam's fused step only
    offered = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps, "fused": fused}
    arguments = {key: value for key, value in offered.items() if key in accepted} | config.optimizer_args
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ratio = config.lora.loraplus_lr_ratio if name.endswith(FASTER) else 1.0
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((ratio, decay), []).append(parameter)
    try:
        optimizer = chosen([{"params": each} for each in groups.values()], **arguments)
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        raise ConfigError(f"optimizer: {chosen.__name__} refuses its options: {error}", "invalid-value") from None
    for group, (ratio, decay) in zip(optimizer.param_groups, groups, strict=True):
        group["lr_ratio"] = ratio
        if "weight_decay" in accepted:
            group["weight_decay"] = decay
    return optimizer


def check_optimizer(config: Config) -> None:
    """Raise the ConfigError that the optimizer's options would give when it is built over a model."""
    build_optimizer(nn.Linear(1, 1), config)


def warmup_steps(config: Config, total: int) -> int:
    """Return the steps in which the learning rate rises. Raises ConfigError when it would not reach its peak."""
    if config.warmup_steps > total:
        raise ConfigError(
            f"warmup_steps: {config.warmup_steps} is more than the {total} steps of n_epochs={config.n_epochs:g}. "
            "Lower it, or set warmup_ratio instead.",
            "out-of-range",
        )
    return config.warmup_steps or round(config.warmup_ratio * total)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]
