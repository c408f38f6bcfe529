"""Configs that are parsed and checked beyond their types: every problem is reported at once."""

import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from minitrain.config.issues import ConfigIssues
from minitrain.config.load import check_writable, default_config, parse_config, parse_python_config
from minitrain.config.saved import to_plain
from minitrain.config.schema import Config, option_fields
from minitrain.config.sections import RolloutConfig
from minitrain.data import checks as data
from minitrain.distributed import checks as distributed
from minitrain.errors import ConfigError
from minitrain.model import checks as model
from minitrain.training import checks as training

CHECKED_WITH_TORCH = {"loss", "optimizer", "optimizer_args", "betas", "eps", "weight_decay", "device", "fsdp"}
CHECKED_WITH_TORCH |= {"lr_scheduler_args"}  # the default of lr depends on the loss


def check_config(
    config: Config, issues: ConfigIssues, written: Set[str] = frozenset(), loss_is_object: bool = False
) -> None:
    """Add to `issues` what is wrong with a config.

    Args:
        written: Names of options that count as given, also at their default.
        loss_is_object: The loss was given in Python, so its class need not be registered.
    """
    defaults = default_config()
    changed = {f.name for f in option_fields(Config) if getattr(config, f.name) != getattr(defaults, f.name)}
    given = changed | written
    if config.model.master_weights != defaults.model.master_weights or config.model.float8 is not None:
        config = _with_dtype(config)
    for check in (distributed.check_processes, data.check, model.check, training.check):
        check(config, given, issues)
    if issues and not changed & CHECKED_WITH_TORCH:
        return  # torch takes seconds to import, and options at their default are rarely wrong
    from minitrain.losses import checks as losses

    distributed.check_device(config, issues)
    loss = losses.check(config, issues, loss_is_object)
    if loss is not None:
        training.check_loss_fits(config, given, loss, issues)
        if config.rollout != RolloutConfig():
            from minitrain.rl import checks as rl  # imports transformers

            rl.check(config, given, loss, issues)
    from minitrain.training.learning_rate import with_lr

    config = with_lr(config, loss)
    training.check_schedule_arguments(config, issues)
    training.check_optimizer_options(config, given, issues)


def _with_dtype(config: Config) -> Config:
    """Return the config with the dtype that `auto` means on its device."""
    import torch

    from minitrain.distributed.parallel import pick_device
    from minitrain.training.compute import with_dtype

    try:
        return with_dtype(config, pick_device(config.device))
    except ConfigError:  # which `check_device` reports
        return with_dtype(config, torch.device("cpu"))


SHARE_OF_A_RUN = 0.7  # users write fewer options, and runs of older versions lack the newest ones


def written_options(raw: dict, overridden: Set[str]) -> set[str]:
    """Return the names of the options that ask for something.

    One that is written as off (false, 0, null, empty) does not, nor does a section in which an option is off, nor
    `${...}`, which may stand for either. The config.yml of a run lists all options with their defaults, so of a file
    with more than `SHARE_OF_A_RUN` of them only the overrides count.

    Args:
        raw: The options as they are written, overrides included.
        overridden: Keys of the overrides.
    """
    if len(raw) > SHARE_OF_A_RUN * len(option_fields(Config)):
        sections = {re.split(r"[.\[]", key)[0] for key in overridden}
        raw = {name: value for name, value in raw.items() if name in sections}
    return {name for name, value in raw.items() if _asks(value)}


def _asks(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(map(_asks, value.values()))
    return bool(value) and not (isinstance(value, str) and "${" in value)


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), **options: Any) -> Config:
    """Read a YAML file, or a dict of the same keys, into a checked `Config`.

    Args:
        source: The path of the file, or the dict.
        overrides: Options as on the command line: ``load_config("c.yml", ["lr=1e-4", "lora.rank=8"])``.
        options: The same as keyword arguments: ``load_config("c.yml", lr=1e-4, lora={"rank": 8})``. A dict is merged
            into its section.

    Raises:
        ConfigError: It lists every problem with its file, line and key.
    """
    return check_parsed(*parse_config(source, lazy_loss_options, overrides, options))


def check_parsed(config: Config, issues: ConfigIssues, loss_is_object: bool = False) -> Config:
    """Return a config that `parse_config` has read. Raises ConfigError for all issues at once."""
    overridden = issues.source.overridden | issues.source.keywords
    check_config(config, issues, written_options(config.interpolation.raw, overridden), loss_is_object)
    issues.raise_if_any()
    config.interpolation = config.interpolation._replace(resolved=to_plain(config))
    return config


def check_python_config(config: Config, loss: dict | None = None) -> Config:
    """Return a checked copy of a config that was built, or changed after loading, in Python.

    Args:
        loss: The `describe_loss` of a loss object, which the copy then names.

    Raises:
        ConfigError: As `load_config` does; also when the config names another loss than `loss`.
    """
    checked, issues = parse_python_config(config, lazy_loss_options, loss)
    check_config(checked, issues, loss_is_object=loss is not None)
    issues.raise_if_any()
    check_writable(checked)
    return checked


def lazy_loss_options(name: str) -> type | None:
    """Return the options of a loss, as `losses.loss_options` does, and import torch only now."""
    from minitrain.losses import loss_options

    return loss_options(name)
