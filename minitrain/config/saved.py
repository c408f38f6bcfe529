"""A config as the YAML of run directories, model cards and trackers."""

import re
from dataclasses import is_dataclass
from typing import Any

from omegaconf import OmegaConf

from minitrain.io.redact import redact_urls

from .schema import Config, option_fields


def config_yaml(config: Config) -> str:
    """Return the config as YAML, including defaults, with `${...}` unresolved and without passwords in URLs.

    An option that was changed in Python after loading has its new value.
    """
    return OmegaConf.to_yaml(OmegaConf.create(saved_options(config)))


def saved_options(config: Config) -> dict:
    """Return the content of `config_yaml` as dicts and lists."""
    interpolation = config.interpolation
    return without_passwords(_restore(to_plain(config), interpolation.raw, interpolation.resolved))


def without_passwords(value: Any) -> Any:
    """Return a config or a part of it without passwords and tokens in URLs."""
    if isinstance(value, dict):
        return {key: without_passwords(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_passwords(entry) for entry in value]
    return redact_urls(value) if isinstance(value, str) else value


def to_plain(value: Any) -> Any:
    """Return a config or a part of it as dicts and lists."""
    if is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in option_fields(value)}
    if isinstance(value, dict):
        return {name: to_plain(entry) for name, entry in value.items()}
    return [to_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _restore(value: Any, raw: Any, resolved: Any) -> Any:
    """Return `value` with the interpolations of `raw` where they still resolve to the same value."""
    if isinstance(raw, str) and "${" in raw:
        if value == resolved:
            return raw
        raw = _spread(raw, resolved)
    if isinstance(value, dict):
        raw, resolved = (part if isinstance(part, dict) else {} for part in (raw, resolved))
        return {key: _restore(entry, raw.get(key), resolved.get(key)) for key, entry in value.items()}
    if isinstance(value, list):
        is_paired = isinstance(raw, list) and isinstance(resolved, list) and len(raw) == len(resolved)
        pairs = list(zip(raw, resolved, strict=True)) if is_paired else []
        return [_restore(entry, *_pair_of(entry, pairs, i)) for i, entry in enumerate(value)]
    return _escape(value) if isinstance(value, str) else value


def _spread(raw: str, resolved: Any) -> Any:
    """Return `raw` for each string in a section or list that one variable sets, after Python changed a part of it.

    Numbers are not secrets, and are saved with their values.
    """
    if "oc.env" not in raw:
        return None
    if isinstance(resolved, dict):
        return {key: raw for key, value in resolved.items() if isinstance(value, str)}
    if isinstance(resolved, list):
        return [raw if isinstance(value, (str, dict)) else None for value in resolved]
    return None


def _pair_of(entry: Any, pairs: list[tuple[Any, Any]], index: int) -> tuple[Any, Any]:
    """Return the (raw, resolved) pair of a list entry, also after Python added or removed other entries."""
    pair_here = pairs[index] if index < len(pairs) else (None, None)
    return pair_here if pair_here[1] == entry else next((pair for pair in pairs if pair[1] == entry), pair_here)


def _escape(text: str) -> str:
    """Return a string with each `${` escaped, also after backslashes."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
