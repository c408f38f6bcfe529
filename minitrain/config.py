"""From a YAML file and dotlist overrides to a checked `Config`: every problem is found and told at once."""

import difflib
import os
import types
import typing
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import ConfigError
from .schema import FOREIGN_NAMES, Config

WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "keys and values",
}


@dataclass
class Source:
    """Where the values came from, so that a problem can name its line."""

    name: str
    lines: dict[str, int]
    overridden: set[str]

    def where(self, key: str) -> str:
        root = key.split(".")[0].split("[")[0]
        if any(k == key or k.split(".")[0].split("[")[0] == root for k in self.overridden):
            return f"--overrides {key}"
        while key and key not in self.lines:
            key_parent = max(key.rfind("."), key.rfind("["))
            if key_parent < 0:
                break
            key = key[:key_parent]
        return f"{self.name}:{self.lines[key]}" if key in self.lines else self.name


class Problems:
    """Collects everything that is wrong with a config, and raises it as one `ConfigError`."""

    def __init__(self, source: Source):
        self.source = source
        self.found: list[str] = []

    def add(self, key: str, what: str) -> None:
        self.found.append(f"{self.source.where(key)}: {key}: {what}")

    def raise_if_any(self) -> None:
        if self.found:
            count = "1 problem" if len(self.found) == 1 else f"{len(self.found)} problems"
            raise ConfigError(f"{count} in the configuration\n" + "\n".join(f"  {line}" for line in self.found))


def load_config(source: str | Path | dict, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file (or a dict of the same keys) and dotlist overrides into a checked `Config`.

    Raises ConfigError, which lists every problem with its file, line and key.
    """
    raw, where = _read(source, overrides or [])
    problems = Problems(where)
    values = _walk(Config, _normalised(_resolve(raw)), "", problems)
    problems.raise_if_any()
    config = _build(Config, values)
    if config.exp_name is None:
        config.exp_name = Path(where.name).stem
    from .checks import check_config

    check_config(config, values, problems)
    problems.raise_if_any()
    config.given = _normalised(OmegaConf.to_container(raw))  # as written, so that ${oc.env:...} is never saved resolved
    return config


def config_yaml(config: Config) -> str:
    """The whole config as YAML, defaults filled in and ``${...}`` as the user wrote them."""
    plain = _merge(_plain(config), config.given)
    return OmegaConf.to_yaml(OmegaConf.create(plain))


def nearest(name: str, known: list[str]) -> str:
    """`` Did you mean ...?`` with the nearest of the known names, or nothing."""
    if name in FOREIGN_NAMES and FOREIGN_NAMES[name].split(" ")[0].split("=")[0].split(".")[0] in known:
        return f" Here it is called {FOREIGN_NAMES[name]}."
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean {match[0]}?" if match else ""


# ---------------------------------------------------------------------------------------------------- reading


def _read(source: str | Path | dict, overrides: list[str]) -> tuple[DictConfig, Source]:
    if isinstance(source, dict):
        raw, where = OmegaConf.create(source), Source("config", {}, set())
    else:
        raw, where = _read_yaml(Path(source))
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"--overrides {override}: write it as key=value, for example lr=2e-5")
        try:
            raw.merge_with_dotlist([override])
        except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"--overrides {override}: {str(error).splitlines()[0]}") from None
        where.overridden.add(key)
    return raw, where


def _read_yaml(path: Path) -> tuple[DictConfig, Source]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: there is no such file.{hint}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: this is a folder; name a YAML file in it.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    try:
        lines = _key_lines(yaml.compose(text, Loader=yaml.SafeLoader))
        raw = OmegaConf.create(text) if text.strip() else OmegaConf.create()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(raw, DictConfig) or (lines == {} and len(raw) and text.strip()):
        raise ConfigError(f"{path}: expected `key: value` lines at the top level.")
    return raw, Source(str(path), lines, set())


def _key_lines(node: yaml.Node | None, path: str = "") -> dict[str, int]:
    """Maps ``a.b[0].c`` to the line it stands on."""
    lines = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{path}.{key.value}" if path else str(key.value)
            lines[name] = key.start_mark.line + 1
            lines |= _key_lines(value, name)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            name = f"{path}[{index}]"
            lines[name] = value.start_mark.line + 1
            lines |= _key_lines(value, name)
    return lines


def _resolve(raw: DictConfig) -> dict:
    try:
        return OmegaConf.to_container(raw, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{getattr(error, 'full_key', None) or 'config'}: {reason}") from None


def _normalised(raw: dict) -> dict:
    """Short forms written out: `datasets: [a.jsonl]`, `loss: dft`."""
    raw = dict(raw)
    for key in ("datasets", "eval_datasets"):
        value = raw.get(key)
        if isinstance(value, (str, dict)):
            value = [value]
        if isinstance(value, list):
            raw[key] = [{"path": entry} if isinstance(entry, str) else entry for entry in value]
    if isinstance(raw.get("loss"), str):
        raw["loss"] = {"name": raw["loss"]}
    return raw


# --------------------------------------------------------------------------------------------- checking types


def _walk(schema: type, given: dict, path: str, problems: Problems) -> dict:
    """The values of `given` converted to the types of `schema`; what does not fit goes to `problems`."""
    known = {f.name: f for f in fields(schema) if f.init}
    aliases = {f.metadata["alias"]: f.name for f in known.values() if f.metadata["alias"]}
    hints = typing.get_type_hints(schema)
    values = {}
    for key, value in given.items():
        full = f"{path}{key}"
        name = aliases.get(key, key)
        if name not in known:
            problems.add(full, f"there is no such option.{nearest(str(key), list(known))}")
        elif name != key and name in given:
            problems.add(full, f"is another name of {name}; give only one of them.")
        elif value == "???":
            problems.add(full, "is left open (???); give it a value.")
        else:
            values[name] = _value(hints[name], value, full, problems)
            _check_limits(known[name].metadata, values[name], full, problems)
    for name, f in known.items():
        if name not in given and f.default is MISSING and f.default_factory is MISSING:
            problems.add(f"{path}{name}", f"is missing: {f.metadata['help']}")
    if path == "" and "model" not in given:
        problems.add("model.name_or_path", "is missing: a folder or hub name, or `tiny` for the embedded model.")
    return values


def _value(hint: Any, value: Any, key: str, problems: Problems) -> Any:
    """`value` as type `hint`: nested dataclasses, lists of them, or a leaf converted by OmegaConf's rules."""
    if is_dataclass(hint):
        if isinstance(value, dict):
            return _walk(hint, value, f"{key}.", problems)
        problems.add(key, f"expected {WORDS[dict]} ({', '.join(f.name for f in fields(hint))}), got {value!r}.")
        return {}
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is list and is_dataclass(args[0]):
        if isinstance(value, list):
            return [_value(args[0], entry, f"{key}[{i}]", problems) for i, entry in enumerate(value)]
        problems.add(key, f"expected {WORDS[list]}, got {value!r}.")
        return []
    inner = (
        next((a for a in args if a is not types.NoneType), hint) if origin in (typing.Union, types.UnionType) else hint
    )
    try:
        leaf = OmegaConf.structured(_leaf_class(hint))
        leaf.value = value
        return OmegaConf.to_container(leaf)["value"]
    except OmegaConfBaseException:
        problems.add(key, f"expected {WORDS[typing.get_origin(inner) or inner]}, got {value!r}.")
        return None


def _leaf_class(hint: Any) -> type:
    return dataclass(type("Leaf", (), {"__annotations__": {"value": hint}, "value": "???"}))


def _check_limits(meta: dict, value: Any, key: str, problems: Problems) -> None:
    if value is None:
        return
    if meta["choices"] and value not in meta["choices"]:
        hint = nearest(str(value), list(meta["choices"]))
        problems.add(key, f"{value!r} is not one of {', '.join(meta['choices'])}.{hint}")
    if not isinstance(value, (int, float)):
        return
    if meta["least"] is not None and not value >= meta["least"]:
        problems.add(key, f"must be {meta['least']} or more, got {value}.")
    if meta["above"] is not None and not value > meta["above"]:
        problems.add(key, f"must be above {meta['above']}, got {value}.")
    if meta["most"] is not None and not value <= meta["most"]:
        problems.add(key, f"must be {meta['most']} or less, got {value}.")


def walk_options(schema: type, given: dict, path: str, problems: Problems) -> Any:
    """Checks a loss's own options against its dataclass and builds it."""
    before = len(problems.found)
    values = _walk(schema, given, path, problems)
    return _build(schema, values) if len(problems.found) == before else None


# ----------------------------------------------------------------------------------------- to and from dataclasses


def _build(schema: type, values: dict) -> Any:
    hints = typing.get_type_hints(schema)
    built = {}
    for name, value in values.items():
        hint, args = hints[name], typing.get_args(hints[name])
        if is_dataclass(hint):
            value = _build(hint, value)
        elif typing.get_origin(hint) is list and is_dataclass(args[0]):
            value = [_build(args[0], entry) for entry in value]
        built[name] = value
    return schema(**built)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.init}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return os.fspath(value) if isinstance(value, Path) else value


def _merge(base: Any, given: Any) -> Any:
    """`base` with the interpolations of `given` put back in."""
    if isinstance(given, str) and "${" in given:
        return given
    if isinstance(base, dict) and isinstance(given, dict):
        return {key: _merge(value, given.get(key)) for key, value in base.items()}
    if isinstance(base, list) and isinstance(given, list) and len(base) == len(given):
        return [_merge(b, g) for b, g in zip(base, given, strict=True)]
    return base
