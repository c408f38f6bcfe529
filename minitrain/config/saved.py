"""A config as the YAML that run directories, model cards and trackers get."""

import re
from dataclasses import is_dataclass
from typing import Any

from omegaconf import OmegaConf

from minitrain.io.redact import redact_urls

from .schema import Config, option_fields


def config_yaml(config: Config) -> str:
    """Return the full config as YAML, with defaults, and with `${...}` as it was written instead of its value.

    An option that was changed in Python afterwards is saved with its new value. Passwords in URLs are left out.
    """
    return OmegaConf.to_yaml(OmegaConf.create(written(config)))


def written(config: Config) -> dict:
    """Return the config as dicts and lists of what is written to its YAML file."""
    return without_passwords(_as_written(plain(config), config.written.raw, config.written.resolved))


def without_passwords(value: Any) -> Any:
    """Return a config, or a part of it, without passwords and tokens in URLs."""
    if isinstance(value, dict):
        return {key: without_passwords(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_passwords(entry) for entry in value]
    return redact_urls(value) if isinstance(value, str) else value


def plain(value: Any) -> Any:
    """Return a config, or a part of it, as dicts and lists."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in option_fields(value)}
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _as_written(value: Any, raw: Any, resolved: Any) -> Any:
    """Return `value` with the interpolations of `raw` put back where they still stand for the same value."""
    if isinstance(raw, str) and "${" in raw:
        if value == resolved:
            return raw
        raw = _spread(raw, resolved)
    if isinstance(value, dict):
        raw, resolved = (part if isinstance(part, dict) else {} for part in (raw, resolved))
        return {key: _as_written(entry, raw.get(key), resolved.get(key)) for key, entry in value.items()}
    if isinstance(value, list):
        fits = isinstance(raw, list) and isinstance(resolved, list) and len(raw) == len(resolved)
        pairs = list(zip(raw, resolved, strict=True)) if fits else []
        return [_as_written(entry, *_pair_of(entry, pairs, i)) for i, entry in enumerate(value)]
    return _escaped(value) if isinstance(value, str) else value


def _spread(raw: str, resolved: Any) -> Any:
    """Return what was written for the parts of a section that one variable stands for, of which Python changed some.

    Numbers are no secrets, and are saved as they are.
    """
    if "oc.env" not in raw:
        return None
    if isinstance(resolved, dict):
        return {key: raw for key, value in resolved.items() if isinstance(value, str)}
    return (
        [raw if isinstance(value, (str, dict)) else None for value in resolved] if isinstance(resolved, list) else None
    )


def _pair_of(entry: Any, pairs: list[tuple[Any, Any]], place: int) -> tuple[Any, Any]:
    """Return what was written for an entry of a list, also when others were added or removed in Python."""
    here = pairs[place] if place < len(pairs) else (None, None)
    return here if here[1] == entry else next((pair for pair in pairs if pair[1] == entry), here)


def _escaped(text: str) -> str:
    """Return a text in which `${` has no meaning, however many backslashes stand before it."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
