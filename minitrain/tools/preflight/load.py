"""Configs that are parsed and checked: every problem is reported at once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minitrain.config.load import check_writable, parse_config, parse_python_config
from minitrain.config.saved import plain
from minitrain.config.schema import Config
from minitrain.config.written import written_options

from .checks import check_config


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
    config, issues = parse_config(source, _loss_options, overrides, options)
    overridden = issues.source.overridden | issues.source.keywords
    check_config(config, issues, written_options(config.written.raw, overridden))
    issues.raise_if_any()
    config.written = config.written._replace(resolved=plain(config))
    return config


def check_python_config(config: Config, loss: dict | None = None) -> Config:
    """Return a checked copy of a config that was built, or changed after loading, in Python.

    Args:
        loss: The `describe_loss` of a loss object, which the copy then names.

    Raises:
        ConfigError: As `load_config` does; also when the config names another loss than `loss`.
    """
    checked, issues = parse_python_config(config, _loss_options, loss)
    check_config(checked, issues, loss_is_object=loss is not None)
    issues.raise_if_any()
    check_writable(checked)
    return checked


def _loss_options(name: str) -> type | None:
    from minitrain.losses import loss_options  # imports torch

    return loss_options(name)
