"""Read the config of a run for a rehearsal on a CPU."""

import dataclasses
from collections.abc import Sequence
from importlib.util import find_spec

from minitrain.config.load import parse_config
from minitrain.config.schema import Config
from minitrain.errors import ConfigError
from minitrain.model.checks import ATTENTION_PACKAGES

from ..preflight.load import check_parsed, lazy_loss_options

Untried = dict[str, str]  # topic -> what a rehearsal does not try of it, and what it does instead


def parse_for_cpu(source: str, overrides: Sequence[str]) -> tuple[Config, str, Untried]:
    """Return the checked config of a run for a CPU, its `fsdp.shard`, and what is not tried because of that.

    Args:
        source: The path of the config.
        overrides: Options as on the command line.

    Raises:
        ConfigError: It lists every problem with its file, line and key.
    """
    config, issues = parse_config(source, lazy_loss_options, overrides)
    untried, shard = _use_cpu(config), config.fsdp.shard
    config.fsdp = dataclasses.replace(config.fsdp, shard="full") if shard == "hybrid" else config.fsdp
    config = check_parsed(config, issues)
    config.device = "cpu"
    return config, shard, untried


def _use_cpu(config: Config) -> Untried:
    """Replace the options of a config that need a GPU, and return what is not tried because of that."""
    untried = {"GPU": "kernels, memory (see minitrain validate), speed, NCCL and the network between machines"}
    model, name = config.model, config.model.attn_implementation
    if name in ATTENTION_PACKAGES:
        package = ATTENTION_PACKAGES[name]
        here = "is installed here" if find_spec(package) else "is not installed here"
        untried["attention"] = f"{name}, whose package {package} {here}; sdpa instead"
        model = dataclasses.replace(model, attn_implementation="auto")
    if model.float8 is not None:
        untried["FP8"] = f"model.float8={model.float8}; plain matrix products instead"
        model = dataclasses.replace(model, float8=None)
    if model.policy_dtype == "auto":
        untried["dtype"] = "bfloat16, which model.policy_dtype=auto means on a GPU; float32 instead"
    if config.compile:
        untried["compile"] = "compiled blocks"
    if config.activation_offload or config.fsdp.cpu_offload:
        untried["offloading"] = "activation_offload and fsdp.cpu_offload, which copy from a GPU"
    config.model, config.compile, config.activation_offload = model, False, False
    if config.device != "auto":  # the checks of a device that is given import torch
        config.device = "cpu"
    config.fsdp = dataclasses.replace(config.fsdp, cpu_offload=False)
    if "." in config.optimizer and not _steps_on_cpu(config):
        untried["optimizer"] = f"{config.optimizer}, which needs a GPU; AdamW instead"
        config.optimizer, config.optimizer_args = "AdamW", {}
    return untried


def _steps_on_cpu(config: Config) -> bool:
    """Return whether the optimizer takes a step on a CPU; True if it does not exist, which the checks report."""
    from minitrain.training.optim import check_optimizer, optimizer_class  # imports torch

    try:
        optimizer_class(config.optimizer)
    except ConfigError:
        return True
    try:
        check_optimizer(config, on_cpu=True)
    except ConfigError:
        return False
    return True
