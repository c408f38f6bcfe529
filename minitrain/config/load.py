"""Parse YAML and dotlist overrides into a `Config`: syntax, interpolation, keys and types."""

import difflib
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minitrain.errors import ConfigError
from minitrain.io.redact import hide, hide_variables

from .aliases import MUTUALLY_EXCLUSIVE, UNTYPED, LossOptions, all_aliases, with_own_names
from .issues import ConfigIssues, Source, check_types, format_value
from .saved import config_yaml, plain
from .schema import DEFAULT_LOSS, Config, Written
from .yaml_nodes import MAX_DEPTH, check_yaml

MAX_CALLS = 5_000_000  # of functions while `${...}` are filled in, some seconds: they can refer to one another
YAML_HINTS = {  # what to do about an error, by words of its message
    "'\\t'": "Indent with spaces, not tabs.",
    "while scanning a simple key": "Write `key: value`, with a space behind the colon.",
    "while scanning a quoted scalar": "A quotation mark that opens here is not closed.",
    "while parsing a flow": "A bracket is not closed, or a comma is missing.",
    "mapping values are not allowed": "Indent keys of one level alike, and put a text with `: ` in it in quotes.",
    "while parsing a block mapping": "Indent keys of one level alike.",
    "cannot start any token": "Put the text in quotes.",
    "duplicate key": "Give it once.",
}
SHOWN = ("exp_name", "output_dir", "cache_dir")  # folders that are written to; messages name them as they are
LISTS = ("datasets", "eval_datasets")  # one entry may stand for a list of one


def parse_config(
    source: str | Path | Mapping[str, Any],
    loss_options: LossOptions,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> tuple[Config, ConfigIssues]:
    """Read a YAML file, or a dict of the same keys, and options that replace some of it.

    Args:
        loss_options: Returns the dataclass of the options of a loss, or None for a name that is not registered.
        overrides: Options as on the command line: ["lr=1e-4"].
        options: Values by name, set after `overrides`.

    Returns:
        The config, and what is wrong with its keys and types. What does not fit is left at its default.

    Raises:
        ConfigError: When the file cannot be read or is not YAML.
    """
    raw, where = _read(source, loss_options)
    issues = ConfigIssues(where)
    if isinstance(overrides, (str, Mapping)):
        raise ConfigError(f"overrides: expected a list such as ['lr=1e-4'], got {overrides!r}.", "wrong-type")
    _override(raw, list(overrides), issues, loss_options)
    _set_options(raw, options or {}, issues, loss_options)
    config = _build_config(_in_bounds(lambda: _resolve(raw, "", issues), where.name), issues, loss_options)
    config.written = Written(with_own_names(OmegaConf.to_container(raw), loss_options), {})
    return config, issues


def parse_python_config(
    config: Config, loss_options: LossOptions, loss: dict | None = None
) -> tuple[Config, ConfigIssues]:
    """Return a copy of a config that was built, or changed after loading, in Python, and what is wrong with its types.

    Args:
        loss_options: As for `parse_config`.
        loss: The `describe_loss` of a loss object, which the copy then names.

    Raises:
        ConfigError: When the config names another loss than `loss`.
    """
    issues, given = ConfigIssues(Source("config")), _attributes(config)
    if loss is not None:
        given["loss"] = merge_loss(given["loss"], loss)
    parsed = _build_config(given, issues, loss_options)
    parsed.written = config.written
    return parsed, issues


def check_writable(config: Config) -> None:
    """Raise ConfigError when a config cannot be written as YAML."""
    try:
        config_yaml(config)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"config: {error.full_key}: cannot be written to config.yml: {_reason(error)}", "invalid-value"
        ) from None


def default_config() -> Config:
    """Return a config of defaults alone, without a model or data."""
    return _build(Config, {"model": {}})


def _build_config(given: dict, issues: ConfigIssues, loss_options: LossOptions) -> Config:
    config = _build(Config, check_types(Config, with_own_names(_long_forms(given), loss_options), "", issues))
    config.loss = DEFAULT_LOSS | config.loss
    if config.exp_name is None:
        config.exp_name = Path(issues.source.name).stem
    return config


def merge_loss(configured: Any, described: dict) -> dict:
    """Return the description of a loss object. Raises ConfigError when the config names another loss than that."""
    written = _long_forms({"loss": configured})["loss"]
    if written not in (DEFAULT_LOSS, described):
        both = f"the config has {format_value(written)}, and Trainer(loss=...) got {format_value(described)}"
        raise ConfigError(f"loss: {both}. Set only one of them.", "conflict")
    return described


def _attributes(value: Any) -> Any:
    """Return a dataclass as dicts and lists, attributes that are no fields included, so that they can be refused."""
    if is_dataclass(value):
        return {name: _attributes(entry) for name, entry in vars(value).items() if not isinstance(entry, Written)}
    return [_attributes(entry) for entry in value] if isinstance(value, (list, tuple)) else value


# ---------------------------------------------------------------------------------------------------- reading


def _read(source: str | Path | Mapping[str, Any], loss_options: LossOptions) -> tuple[DictConfig, Source]:
    """What was written, with short forms made out, and where each key stands."""
    lines = {}
    if not isinstance(source, (str, Path, Mapping)):
        kind = type(source).__name__
        advice = " Change it with dataclasses.replace(config, lr=1e-4)." if isinstance(source, Config) else ""
        raise ConfigError(f"config: expected the path of a YAML file, or a dict, got {kind}.{advice}", "wrong-type")
    if isinstance(source, Mapping):
        name, raw = "config", _guarded("config", lines, lambda: OmegaConf.create(dict(source)))
    else:
        name, text = str(source), _read_text(Path(source))
        raw = _guarded(name, lines, lambda: _parse(text, name, lines))
    given = _long_forms(OmegaConf.to_container(raw))
    names = all_aliases(given, loss_options)
    lines |= {key: lines[alias] for alias, key in names.items() if alias in lines and key not in lines}
    return OmegaConf.create(given), Source(name, lines)


def _read_text(path: Path) -> str:
    if path.name.removesuffix(".gz").endswith((".jsonl", ".csv", ".tsv")):
        raise ConfigError(f"{path}: this is a file of data; name the YAML file whose `datasets` name it.", "wrong-path")
    try:
        if path.exists() and not path.is_dir() and not path.is_file():
            raise ConfigError(f"{path}: not a regular file (a pipe or a device). Name a YAML file.", "wrong-path")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: there is no such file.{hint}", "not-found") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: this is a folder; name a YAML file in it.", "wrong-path") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text (byte {error.start}), so it is no YAML file.", "invalid-text"
        ) from None
    except ConfigError:  # which is a ValueError, too
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}.", "unreadable") from None


def _parse(text: str, name: str, lines: dict[str, int]) -> DictConfig:
    node, found = check_yaml(text, name)
    lines |= found
    if node is None:
        return OmegaConf.create()
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{name}: expected lines of the form `key: value`, for example `lr: 2e-5`.", "invalid-yaml")
    return OmegaConf.create(text)


def _guarded(name: str, lines: dict[str, int], read: Callable) -> Any:
    """What `read` returns. Raises ConfigError, with the line where it is known, when it is not valid YAML."""
    try:
        return read()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if error.context_mark and "scanning" in error.context:  # where it begins, and not where the file ends
            mark = error.context_mark
        place = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"{place}: not valid YAML: {_reason(error)}", "invalid-yaml") from None
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        raise ConfigError(
            f"{Source(name, lines).where(key)[1]}: {key or 'a key'}: {_reason(error)}", "invalid-yaml"
        ) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{name}: not valid YAML: {_reason(error)}", "invalid-yaml") from None


def _reason(error: Exception) -> str:
    """What an error of YAML or OmegaConf says, in one line."""
    if isinstance(error, RecursionError):
        return "it is nested without end."
    if isinstance(error, yaml.MarkedYAMLError):
        reason = error.problem or error.context
        reason = f"{error.context}, {reason}" if reason.startswith("but ") else reason
        hints = [hint for words, hint in YAML_HINTS.items() if words in f"{error.context} {reason}"]
        return " ".join([f"{reason}.", *hints[:1]])
    reason = str(error).splitlines()[0].removeprefix("KeyError raised while resolving interpolation: ")
    return reason.strip('"') + "."


def _override(raw: DictConfig, overrides: list[str], issues: ConfigIssues, loss_options: LossOptions) -> None:
    """Merges the dotlist into `raw`. Of two rivals the one that is overridden wins."""
    overridden = issues.source.overridden
    names = all_aliases(OmegaConf.to_container(raw), loss_options, overrides)
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or key.count(".") > MAX_DEPTH or not re.fullmatch(r"[^.\[\]\s]+(\.[^.\[\]\s]+|\[\d+\])*", key):
            overridden.add(text)
            issues.add(text, "usage", "write it as key=value, for example lr=2e-5.")
            continue
        key = _name_in(raw, _names_of(key, names))
        try:
            check_yaml(value, key)
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"]
            _set(raw, key, parsed, names, overridden)
        except ConfigError as error:
            overridden.add(key)
            issues.add(key, error.code, error.message.partition(": ")[2])
        except (OmegaConfBaseException, yaml.YAMLError, RecursionError) as error:
            overridden.add(key)
            issues.add(key, "invalid-value", f"cannot be set to {format_value(value)}: {_reason(error)}")
        except ValueError:  # of a part that is no index
            overridden.add(key)
            issues.add(
                key,
                "unknown-option",
                "names an option of a list. Name an entry of it, for example datasets[0].path=a.jsonl.",
            )
    _drop_rivals(raw, overridden)


def _set_options(raw: DictConfig, options: Mapping[str, Any], issues: ConfigIssues, loss_options: LossOptions) -> None:
    """Set options that are keyword arguments in Python."""
    given, loss, keywords = OmegaConf.to_container(raw), options.get("loss"), issues.source.keywords
    if isinstance(loss, dict) and isinstance(given.get("loss"), dict):
        loss = given["loss"] | loss
    names = all_aliases(given | ({"loss": loss} if loss else {}), loss_options)
    for key, value in options.items():
        value = str(value) if isinstance(value, Path) else plain(value)
        try:
            _set(raw, key, value, names, keywords)
        except (OmegaConfBaseException, ValueError) as error:
            issues.add(key, "wrong-type", f"cannot be set to {format_value(value)}: {_reason(error)}")
    _drop_rivals(raw, keywords)


def _set(raw: DictConfig, key: str, value: Any, names: dict[str, str], changed: set[str]) -> None:
    """Set an option under the name that `raw` has of it, and add all its names to `changed`. `names` are aliases."""
    all_names = _names_of(key, names)
    key = _name_in(raw, all_names)
    value = [value] if key in LISTS and isinstance(value, dict) else value
    if key == "loss" and isinstance(value, dict):
        inner = {name: _name_in(raw, _names_of(f"loss.{name}", names)) for name in value}
        value = {inner[name].removeprefix("loss."): entry for name, entry in value.items()}
    changed.update(leaf for name in all_names for leaf in _leaves(name, value))
    OmegaConf.update(raw, key, value)


def _drop_rivals(raw: DictConfig, overridden: set[str]) -> None:
    """Remove an option that excludes one that is overridden."""
    given = OmegaConf.to_container(raw)
    for one, other in (*MUTUALLY_EXCLUSIVE, *(pair[::-1] for pair in MUTUALLY_EXCLUSIVE)):
        if one in overridden and given.get(one) and other not in overridden:
            raw.pop(other, None)


def _names_of(key: str, names: dict[str, str]) -> list[str]:
    """Return all names of an option, `key` first. `names` are aliases."""
    own = names.get(key, key)
    return list(dict.fromkeys([key, own, *(alias for alias, name in names.items() if name == own)]))


def _name_in(raw: DictConfig, names: list[str]) -> str:
    """Return the name that a config has of an option; the first one when it has none."""
    given = OmegaConf.to_container(raw)
    loss = given.get("loss")
    there = {*given, *(f"loss.{name}" for name in loss if isinstance(loss, dict))} if loss else set(given)
    return next((name for name in names if name in there), names[0])


def _leaves(key: str, value: Any) -> list[str]:
    """The keys that an override sets: dicts are merged into what is there, all else takes its place."""
    if not isinstance(value, dict):
        return [key]
    return [leaf for name, entry in value.items() for leaf in _leaves(f"{key}.{name}", entry)]


class _TooManyCalls(BaseException):
    """Is no Exception, so that OmegaConf does not make one of its own of it."""


def _in_bounds(fill: Callable, name: str) -> Any:
    """Return what `fill` returns. Raises ConfigError when it calls more than `MAX_CALLS` functions."""
    budget, before = iter(range(MAX_CALLS)), sys.getprofile()

    def count(frame: Any, event: str, argument: Any) -> None:
        if next(budget, None) is None:
            raise _TooManyCalls  # which ends the counting, too

    sys.setprofile(count)
    try:
        return fill()
    except _TooManyCalls:
        told = "the references to other options, ${...}, multiply without bound. Write the values out."
        raise ConfigError(f"{name}: {told}", "too-large") from None
    finally:
        sys.setprofile(before)


def _resolve(node: Any, path: str, issues: ConfigIssues) -> Any:
    """Plain values with ``${...}`` filled in; what cannot be filled in is told, and stays as it is written."""
    if isinstance(node, DictConfig):
        keys = [(name, f"{path}.{name}".lstrip(".")) for name in node]
    elif isinstance(node, ListConfig):
        keys = [(i, f"{path}[{i}]") for i in range(len(node))]
    else:
        return node
    values = OmegaConf.to_container(node)
    for name, key in keys:
        if values[name] == "???":
            continue
        raw = values[name]
        is_hidden = isinstance(raw, str) and key not in SHOWN and hide_variables(raw)
        try:
            values[name] = _resolve(node[name], key, issues)
            if is_hidden:
                hide(values[name], raw)
        except (OmegaConfBaseException, RecursionError) as error:
            issues.add(key, "invalid-reference", f"{format_value(values[name])} cannot be filled in: {_reason(error)}")
    return values


def _long_forms(given: dict) -> dict:
    """Short forms written out: `datasets: a.jsonl`, `loss: dft`."""
    given = dict(given)
    for key in LISTS:
        value = given.get(key)
        if isinstance(value, dict) or _is_text(value):
            value = [value]
        if isinstance(value, list):
            given[key] = [_long_entry(entry) for entry in value]
    if _is_text(given.get("loss")):
        given["loss"] = {"name": given["loss"]}
    return given


def _long_entry(entry: Any) -> Any:
    """Return an entry of `datasets` as keys and values, without a `type` that says nothing about its rows."""
    if _is_text(entry):
        return {"path": entry}
    if isinstance(entry, dict) and entry.get("type") in UNTYPED:
        return {key: value for key, value in entry.items() if key != "type"}
    return entry


def _is_text(value: Any) -> bool:
    """Whether it is a text for sure; what a ``${...}`` will be is not known before it is filled in."""
    return isinstance(value, (str, Path)) and not str(value).startswith("${")


# ----------------------------------------------------------------------------------------- to and from dataclasses


def _build(schema: type, values: dict) -> Any:
    """The dataclass of checked values. A required one that is missing, as was told, becomes an empty text."""
    hints = typing.get_type_hints(schema)
    built = {f.name: "" for f in fields(schema) if f.default is MISSING and f.default_factory is MISSING}
    for name, value in values.items():
        hint, args = hints[name], typing.get_args(hints[name])
        if is_dataclass(hint):
            value = _build(hint, value)
        elif typing.get_origin(hint) is list and is_dataclass(args[0]):
            value = [_build(args[0], entry) for entry in value]
        built[name] = value
    return schema(**built)
