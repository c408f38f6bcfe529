"""Parse YAML, overrides and keyword arguments into a `Config`: syntax, references, keys and types."""

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

from .aliases import MUTUALLY_EXCLUSIVE, ORIGIN_TYPES, LossOptions, all_aliases, resolve_aliases
from .issues import ConfigIssues, ConfigSource, check_types, format_value
from .saved import config_yaml, to_plain
from .schema import DEFAULT_LOSS, LISTS, Config, Interpolation
from .yaml_nodes import MAX_DEPTH, check_yaml

MAX_CALLS = 5_000_000  # of functions to resolve `${...}`, some seconds: nested references can expand exponentially
YAML_HINTS = {  # words of an error of PyYAML -> what to do
    "'\\t'": "Indent with spaces, not tabs.",
    "while scanning a simple key": "Write `key: value`, with a space after the colon.",
    "while scanning a quoted scalar": "Close the quotation mark that opens here.",
    "while parsing a flow": "Close the bracket, or add the missing comma.",
    "mapping values are not allowed": "Indent keys of one level equally, and put a value with `: ` in quotes.",
    "while parsing a block mapping": "Indent keys of one level equally.",
    "cannot start any token": "Put the value in quotes.",
    "duplicate key": "Set it only once.",
}
VISIBLE = ("exp_name", "output_dir", "cache_dir")  # output folders; messages show their values, not variables


def parse_config(
    source: str | Path | Mapping[str, Any],
    loss_options: LossOptions,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> tuple[Config, ConfigIssues]:
    """Parse a YAML file or a dict, with overrides and keyword arguments.

    Args:
        loss_options: Returns the dataclass of the options of a loss, or None for a name that is not registered.
        overrides: Options as on the command line: ["lr=1e-4"].
        options: Keyword arguments, applied after `overrides`.

    Returns:
        The config, with defaults for invalid values, and the issues with its keys and types.

    Raises:
        ConfigError: If the file cannot be read or is not YAML.
    """
    raw, origin = _read(source, loss_options)
    issues = ConfigIssues(origin)
    if isinstance(overrides, (str, Mapping)):
        raise ConfigError(f"overrides: expected a list such as ['lr=1e-4'], got {overrides!r}.", "wrong-type")
    _apply_overrides(raw, list(overrides), issues, loss_options)
    _apply_keywords(raw, options or {}, issues, loss_options)
    resolved = _limit_calls(lambda: _resolve_references(raw, "", issues), origin.name)
    config = _build_config(resolved, issues, loss_options)
    config.interpolation = Interpolation(resolve_aliases(OmegaConf.to_container(raw), loss_options), {})
    return config, issues


def parse_python_config(
    config: Config, loss_options: LossOptions, loss: dict | None = None
) -> tuple[Config, ConfigIssues]:
    """Return a copy of a config that was built or changed in Python, and the issues with its types.

    Args:
        loss_options: As for `parse_config`.
        loss: The `describe_loss` of a loss object, which the copy gets as its loss.

    Raises:
        ConfigError: If the config names a different loss than `loss`.
    """
    issues, given = ConfigIssues(ConfigSource("config")), _to_dicts(config)
    if loss is not None:
        given["loss"] = merge_loss(given["loss"], loss)
    parsed = _build_config(given, issues, loss_options)
    parsed.interpolation = config.interpolation
    return parsed, issues


def check_writable(config: Config) -> None:
    """Raise ConfigError if a config cannot be written as YAML."""
    try:
        config_yaml(config)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"config: {error.full_key}: cannot be written to config.yml: {_describe(error)}", "invalid-value"
        ) from None


def default_config() -> Config:
    """Return a config with only defaults, without a model and data."""
    return _build(Config, {"model": {}})


def _build_config(given: dict, issues: ConfigIssues, loss_options: LossOptions) -> Config:
    given = resolve_aliases(_expand_short_forms(given), loss_options)
    config = _build(Config, check_types(Config, given, "", issues))
    config.loss = DEFAULT_LOSS | config.loss
    if config.exp_name is None:
        config.exp_name = Path(issues.source.name).stem
    return config


def merge_loss(configured: Any, described: dict) -> dict:
    """Return the description of a loss object. Raise ConfigError if the config names a different loss."""
    configured = _expand_short_forms({"loss": configured})["loss"]
    if configured not in (DEFAULT_LOSS, described):
        losses = f"the config has {format_value(configured)}, and Trainer(loss=...) got {format_value(described)}"
        raise ConfigError(f"loss: {losses}. Set only one of them.", "conflict")
    return described


def _to_dicts(value: Any) -> Any:
    """Return a dataclass as dicts and lists, including attributes that are not fields, which become issues."""
    if is_dataclass(value):
        return {name: _to_dicts(entry) for name, entry in vars(value).items() if not isinstance(entry, Interpolation)}
    return [_to_dicts(entry) for entry in value] if isinstance(value, (list, tuple)) else value


# ---------------------------------------------------------------------------------------------------- reading


def _read(source: str | Path | Mapping[str, Any], loss_options: LossOptions) -> tuple[DictConfig, ConfigSource]:
    """Return the options with short forms expanded, and the origin with the line of each key."""
    lines = {}
    if not isinstance(source, (str, Path, Mapping)):
        type_name = type(source).__name__
        advice = " Change it with dataclasses.replace(config, lr=1e-4)." if isinstance(source, Config) else ""
        raise ConfigError(f"config: expected the path of a YAML file or a dict, got {type_name}.{advice}", "wrong-type")
    if isinstance(source, Mapping):
        name, raw = "config", _convert_errors("config", lines, lambda: OmegaConf.create(dict(source)))
    else:
        name, text = str(source), _read_text(Path(source))
        raw = _convert_errors(name, lines, lambda: _parse(text, name, lines))
    given = _expand_short_forms(OmegaConf.to_container(raw))
    names = all_aliases(given, loss_options)
    lines |= {key: lines[alias] for alias, key in names.items() if alias in lines and key not in lines}
    return OmegaConf.create(given), ConfigSource(name, lines)


def _read_text(path: Path) -> str:
    if path.name.removesuffix(".gz").endswith((".jsonl", ".csv", ".tsv")):
        raise ConfigError(
            f"{path}: expected a YAML file, got a data file. Give a config with this path in `datasets`.", "wrong-path"
        )
    try:
        if path.exists() and not path.is_dir() and not path.is_file():
            raise ConfigError(f"{path}: is not a regular file, but a pipe or a device. Give a YAML file.", "wrong-path")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: does not exist.{hint}", "not-found") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder. Give a YAML file in it.", "wrong-path") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: is not UTF-8 text (byte {error.start} is invalid). Give a YAML file.", "invalid-text"
        ) from None
    except ConfigError:  # a ValueError, too
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}.", "unreadable") from None


def _parse(text: str, name: str, lines: dict[str, int]) -> DictConfig:
    node, lines_of_text = check_yaml(text, name)
    lines |= lines_of_text
    if node is None:
        return OmegaConf.create()
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{name}: expected lines of the form `key: value`, such as `lr: 2e-5`.", "invalid-yaml")
    return OmegaConf.create(text)


def _convert_errors(name: str, lines: dict[str, int], read: Callable) -> Any:
    """Return the result of `read`. Raise errors of YAML as ConfigError, with the line if it is known."""
    try:
        return read()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if error.context_mark and "scanning" in error.context:  # the line where it begins, not the end of the file
            mark = error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"{where}: invalid YAML: {_describe(error)}", "invalid-yaml") from None
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        raise ConfigError(
            f"{ConfigSource(name, lines).locate(key)[1]}: {key or 'a key'}: {_describe(error)}", "invalid-yaml"
        ) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{name}: invalid YAML: {_describe(error)}", "invalid-yaml") from None


def _describe(error: Exception) -> str:
    """Return the message of an error of PyYAML or OmegaConf, in one line."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply."
    if isinstance(error, yaml.MarkedYAMLError):
        reason = error.problem or error.context
        reason = f"{error.context}, {reason}" if reason.startswith("but ") else reason
        hints = [hint for words, hint in YAML_HINTS.items() if words in f"{error.context} {reason}"]
        return " ".join([f"{reason}.", *hints[:1]])
    reason = str(error).splitlines()[0].removeprefix("KeyError raised while resolving interpolation: ")
    return reason.strip('"') + "."


def _apply_overrides(raw: DictConfig, overrides: list[str], issues: ConfigIssues, loss_options: LossOptions) -> None:
    """Merge the dotlist into `raw`. An override removes the options that it excludes."""
    overridden = issues.source.overridden
    names = all_aliases(OmegaConf.to_container(raw), loss_options, overrides)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or key.count(".") > MAX_DEPTH or not re.fullmatch(r"[^.\[\]\s]+(\.[^.\[\]\s]+|\[\d+\])*", key):
            overridden.add(override)
            issues.add(override, "usage", "expected key=value, such as lr=2e-5.")
            continue
        key = _used_name(raw, _all_names(key, names))
        try:
            check_yaml(value, key)
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"]
            _set(raw, key, parsed, names, overridden)
        except ConfigError as error:
            overridden.add(key)
            issues.add(key, error.code, error.message.partition(": ")[2])
        except (OmegaConfBaseException, yaml.YAMLError, RecursionError) as error:
            overridden.add(key)
            issues.add(key, "invalid-value", f"cannot be set to {format_value(value)}: {_describe(error)}")
        except ValueError:  # a part of the key is not an index
            overridden.add(key)
            issues.add(
                key,
                "unknown-option",
                "is an option of a list entry. Name the entry, such as datasets[0].path=a.jsonl.",
            )
    _drop_excluded(raw, overridden)


def _apply_keywords(
    raw: DictConfig, options: Mapping[str, Any], issues: ConfigIssues, loss_options: LossOptions
) -> None:
    """Set the options that are keyword arguments in Python."""
    given, loss, keywords = OmegaConf.to_container(raw), options.get("loss"), issues.source.keywords
    if isinstance(loss, dict) and isinstance(given.get("loss"), dict):
        loss = given["loss"] | loss
    names = all_aliases(given | ({"loss": loss} if loss else {}), loss_options)
    for key, value in options.items():
        value = str(value) if isinstance(value, Path) else to_plain(value)
        try:
            _set(raw, key, value, names, keywords)
        except (OmegaConfBaseException, ValueError) as error:
            issues.add(key, "wrong-type", f"cannot be set to {format_value(value)}: {_describe(error)}")
    _drop_excluded(raw, keywords)


def _set(raw: DictConfig, key: str, value: Any, names: dict[str, str], changed: set[str]) -> None:
    """Set an option under the name that `raw` uses, and add all its names to `changed`. `names` is {alias: name}."""
    all_names = _all_names(key, names)
    key = _used_name(raw, all_names)
    value = [value] if key in LISTS and isinstance(value, dict) else value
    if key == "loss" and isinstance(value, dict):
        inner = {name: _used_name(raw, _all_names(f"loss.{name}", names)) for name in value}
        value = {inner[name].removeprefix("loss."): entry for name, entry in value.items()}
    changed.update(leaf for name in all_names for leaf in _leaves(name, value))
    OmegaConf.update(raw, key, value)


def _drop_excluded(raw: DictConfig, overridden: set[str]) -> None:
    """Remove the options that an overridden one excludes."""
    given = OmegaConf.to_container(raw)
    for option, excluded in (*MUTUALLY_EXCLUSIVE, *(pair[::-1] for pair in MUTUALLY_EXCLUSIVE)):
        if option in overridden and given.get(option) and excluded not in overridden:
            raw.pop(excluded, None)


def _all_names(key: str, names: dict[str, str]) -> list[str]:
    """Return all names of an option, `key` first. `names` is {alias: name}."""
    option = names.get(key, key)
    return list(dict.fromkeys([key, option, *(alias for alias, name in names.items() if name == option)]))


def _used_name(raw: DictConfig, names: list[str]) -> str:
    """Return the name under which a config sets an option, or the first name if it does not."""
    given = OmegaConf.to_container(raw)
    loss = given.get("loss")
    used = {*given, *(f"loss.{name}" for name in (loss if isinstance(loss, dict) else ()))}
    return next((name for name in names if name in used), names[0])


def _leaves(key: str, value: Any) -> list[str]:
    """Return the keys that an override sets. Dicts are merged into a section; other values replace the old one."""
    if not isinstance(value, dict):
        return [key]
    return [leaf for name, entry in value.items() for leaf in _leaves(f"{key}.{name}", entry)]


class _TooManyCalls(BaseException):
    """`MAX_CALLS` is exceeded. Not an Exception, which OmegaConf would convert to one of its own."""


def _limit_calls(resolve: Callable, name: str) -> Any:
    """Return the result of `resolve`. Raise ConfigError if it calls more than `MAX_CALLS` functions."""
    budget, before = iter(range(MAX_CALLS)), sys.getprofile()

    def count(frame: Any, event: str, argument: Any) -> None:
        if next(budget, None) is None:
            raise _TooManyCalls  # also ends the counting

    sys.setprofile(count)
    try:
        return resolve()
    except _TooManyCalls:
        message = f"{name}: the references ${{...}} expand to too many values. Replace them by their values."
        raise ConfigError(message, "too-large") from None
    finally:
        sys.setprofile(before)


def _resolve_references(node: Any, path: str, issues: ConfigIssues) -> Any:
    """Return the values with ``${...}`` resolved. One that cannot be resolved becomes an issue, and stays as it is."""
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
        is_hidden = isinstance(raw, str) and key not in VISIBLE and hide_variables(raw)
        try:
            values[name] = _resolve_references(node[name], key, issues)
            if is_hidden:
                hide(values[name], raw)
        except (OmegaConfBaseException, RecursionError) as error:
            issues.add(key, "invalid-reference", f"{format_value(values[name])} cannot be resolved: {_describe(error)}")
    return values


def _expand_short_forms(given: dict) -> dict:
    """Return options with short forms expanded, such as `datasets: a.jsonl` and `loss: dft`."""
    given = dict(given)
    for key in LISTS:
        value = given.get(key)
        if isinstance(value, dict) or _is_string(value):
            value = [value]
        if isinstance(value, list):
            given[key] = [_expand_entry(entry) for entry in value]
    if _is_string(given.get("loss")):
        given["loss"] = {"name": given["loss"]}
    rollout = given.get("rollout")
    if isinstance(rollout, dict) and (_is_string(rollout.get("rewards")) or isinstance(rollout.get("rewards"), dict)):
        given["rollout"] = rollout | {"rewards": [rollout["rewards"]]}
    return given


def _expand_entry(entry: Any) -> Any:
    """Return an entry of `datasets` as a dict, without a `type` that is not a row format."""
    if _is_string(entry):
        return {"path": entry}
    if isinstance(entry, dict) and entry.get("type") in ORIGIN_TYPES:
        return {key: value for key, value in entry.items() if key != "type"}
    return entry


def _is_string(value: Any) -> bool:
    """Return whether a value is a string or path; the type of a ``${...}`` is unknown before it is resolved."""
    return isinstance(value, (str, Path)) and not str(value).startswith("${")


# ----------------------------------------------------------------------------------------- to and from dataclasses


def _build(schema: type, values: dict) -> Any:
    """Return the dataclass of checked values. A missing required one, which has an issue, becomes an empty string."""
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
