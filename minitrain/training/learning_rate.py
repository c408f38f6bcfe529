"""Learning rates that fit the loss and the adapter, and warnings about others; sources: docs/learning-rates.md."""

import dataclasses
import json
from pathlib import Path

import torch

from minitrain.config.python_objects import find_object
from minitrain.config.schema import Config
from minitrain.losses import Loss
from minitrain.model.policy import Policy
from minitrain.model.soft_prompt import PEFT_TYPES

from .compute import with_dtype

FULL = "full tuning"
# The learning rate that fits an adapter, as a multiple of that of full tuning.
FACTORS = {FULL: 1, "LoRA": 10, "prefix tuning": 250, "prompt tuning": 1000}
FAR = 50  # a learning rate this many times above the default is too high
WARNED_WIDTH = 512  # of the embeddings: narrower models train with larger learning rates
LARGE_BATCH = 128  # the largest of the sources that LoRA trains as well with as full tuning
FEW_STEPS = 100


def with_defaults(config: Config, device: torch.device, loss: Loss) -> Config:
    """Return the config with the values that unset options have on this device, with this loss and adapter."""
    return with_lr(with_dtype(config, device), loss)


def with_lr(config: Config, loss: Loss | None) -> Config:
    """Return the config with the learning rate that `lr` means if it is not set.

    Args:
        loss: The loss; None if it is unknown.
    """
    return config if config.lr is not None else dataclasses.replace(config, lr=default_lr(config, loss))


def default_lr(config: Config, loss: Loss | None) -> float:
    """Return the default learning rate of a loss with the adapter of the config."""
    return float(f"{(loss or Loss).full_lr * FACTORS[_method(config)]:.6g}")  # 0.0002, not 0.00020000000000000001


def describe_optimizer(config: Config, loss: Loss, warmup: int) -> str:
    """Return the optimizer, its learning rate and its schedule in words."""
    lr = f"lr {config.lr:g}"
    if find_object(config.optimizer):
        lr = "lr of its own"
    elif config.lr == default_lr(config, loss):
        lr += f" (the default of {loss.name} with {_method(config)})"
    return f"{config.optimizer}, {lr}, {config.lr_scheduler} schedule, {warmup} warmup steps"


def lr_warnings(config: Config, policy: Policy, loss: Loss) -> list[str]:
    """Return a warning if the learning rate is far from what fits, as far as there are sources: for Adam."""
    method, default, lr = _method(config), default_lr(config, loss), config.lr
    if not lr or _is_narrow(policy) or find_object(config.optimizer) or "adam" not in config.optimizer.lower():
        return []
    advice = f"{default:g} is usual for {loss.name} with {method} (docs/learning-rates.md)"
    if method != FULL and lr <= loss.full_lr and config.lora.init in ("default", "gaussian"):
        return [f"lr={lr:g} is low: {advice}"]
    return [f"lr={lr:g} is high: {advice}"] if lr >= FAR * default else []


def batch_hints(config: Config, policy: Policy, loss: Loss, n_steps: int) -> list[str]:
    """Return hints about total_batch_size, for losses that train on the responses of data files."""
    if _is_narrow(policy) or loss.example_type == "rollout" or loss.online:
        return []
    size, hints = config.total_batch_size, []
    if _method(config) == "LoRA" and size > LARGE_BATCH:
        hints.append(f"LoRA can learn less from large batches: compare total_batch_size={size} with {LARGE_BATCH}")
    if config.n_steps is None and n_steps < FEW_STEPS and size > 1:
        hints.append(f"{n_steps} optimizer steps are few: a smaller total_batch_size than {size} gives more")
    return hints


def _method(config: Config) -> str:
    """Return the key of FACTORS for what a config trains."""
    if config.soft_prompt.num_virtual_tokens:
        return f"{config.soft_prompt.method} tuning"
    if config.model.adapter:
        try:
            peft_type = json.loads((Path(config.model.adapter) / "adapter_config.json").read_text())["peft_type"]
        except (OSError, ValueError, LookupError, TypeError):  # which loading the adapter reports
            peft_type = None
        return next((f"{name} tuning" for name, value in PEFT_TYPES.items() if value == peft_type), "LoRA")
    return "LoRA" if config.lora.rank else FULL


def _is_narrow(policy: Policy) -> bool:
    return policy.model.get_input_embeddings().weight.shape[-1] < WARNED_WIDTH
