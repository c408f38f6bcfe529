"""Conversion of values to the types of the schema, and the issues of a config, which are reported together."""

import math
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from minitrain.errors import CODES, InvalidConfigError, Issue
from minitrain.io.redact import redact

from .option import MAX_NUMBER, MIN_FRACTION
from .schema import aliases, option_fields
from .suggest import hint_for_key, hint_for_value, is_known_elsewhere, nearest_names, suggest

WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "keys and values",
}
MAX_HINTS = 20  # unknown options that get a hint, because each search takes milliseconds
MAX_ISSUES = 100


@dataclass
class ConfigSource:
    """The origin of a config, which gives the line of each key.

    Attributes:
        lines: Line of each key in the file.
        overridden: Keys set on the command line.
        keywords: Keys set by keyword arguments.
    """

    name: str
    lines: dict[str, int] = field(default_factory=dict)
    overridden: set[str] = field(default_factory=set)
    keywords: set[str] = field(default_factory=set)

    def locate(self, key: str) -> tuple[float, str]:
        """Return a number to sort by and the location to print, such as ``c.yml:3``."""
        if any(keys_overlap(key, other) for other in self.overridden):
            return math.inf, "--overrides"
        if any(keys_overlap(key, other) for other in self.keywords):
            return math.inf, "load_config(...)"
        while key and key not in self.lines:
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return (self.lines[key], f"{self.name}:{self.lines[key]}") if key else (0, self.name)

    def has(self, key: str) -> bool:
        return key in self.lines or key in self.overridden or key in self.keywords


class ConfigIssues:
    """Collects the issues of a config, and raises them as one `ConfigError`."""

    def __init__(self, source: ConfigSource):
        self.source = source
        self.entries: list[tuple[float, Issue]] = []  # with a number to sort by
        self.reported: set[str] = set()  # keys that have an issue

    def __bool__(self) -> bool:
        return bool(self.entries)

    def add(self, key: str, code: str, message: str, *related: str) -> None:
        """Add an issue with one of `errors.CODES`, unless `key` or one of the `related` keys has an issue already."""
        assert code in CODES, code
        if any(keys_overlap(reported, other) for reported in self.reported for other in (key, *related)):
            return
        self.reported.add(key)
        order, where = self.source.locate(key)
        self.entries.append((order, Issue(where, key, code, message)))
        if len(self.entries) == MAX_ISSUES:
            self.raise_if_any()

    def raise_if_any(self) -> None:
        if self.entries:
            in_order = [issue for _, issue in sorted(self.entries, key=lambda pair: pair[0])]
            raise InvalidConfigError(in_order, is_complete=len(self.entries) < MAX_ISSUES)


def keys_overlap(a: str, b: str) -> bool:
    """Return whether two keys are equal, or one contains the other."""
    short, long = sorted((a, b), key=len)
    return long == short or long.startswith((f"{short}.", f"{short}["))


def format_value(value: Any) -> str:
    """Return a value as error messages show it."""
    try:
        text = "nothing" if value is None else repr(value)
    except ValueError:  # Python refuses to print an integer with thousands of digits
        text = "a number with thousands of digits"
    text = redact(text)  # before it is shortened, because `redact` does not recognize a part of a secret
    return text if len(text) <= 80 else text[:77] + "..."


def regex_error(expression: str) -> str | None:
    """Return the error in a regular expression, or None."""
    try:
        re.compile(expression)
    except re.error as error:
        return str(error)
    return None


# -------------------------------------------------------------------------------------------- types and limits


class _InvalidValue(Exception):
    """A value does not have the type of its option, or is outside its limits."""

    def __init__(self, message: str, code: str):
        super().__init__(message)
        self.code = code


def check_types(schema: type, given: dict, path: str, issues: ConfigIssues) -> dict:
    """Return the values of `given` as the types of `schema`, without invalid ones, which become issues."""
    known = {f.name: f for f in option_fields(schema)}
    hints, other_names = typing.get_type_hints(schema), aliases(schema)
    values = {}
    for key, value in ((str(key), value) for key, value in given.items()):
        full = f"{path}{key}"
        if key in other_names:
            message = f"is an alias of {path}{other_names[key]}, which is also set. Set only one of them."
            issues.add(full, "conflict", message)
        elif key not in known:
            _add_unknown(full, value, list(known), issues)
        elif value == "???":
            issues.add(full, "missing-option", "is not set (???). Set it.")
        else:
            try:
                if isinstance(value, str) and "\0" in value:
                    raise _InvalidValue(
                        f"contains a NUL character, got {format_value(value)}. Remove it.", "invalid-value"
                    )
                if isinstance(value, bool | str | None):
                    value = known[key].metadata.get("spellings", {}).get(str(value).lower(), value)
                values[key] = _value(hints[key], value, full, issues)
                if known[key].metadata:  # the fields of a custom loss may be plain dataclass fields
                    check_limits(known[key].metadata, values[key])
            except _InvalidValue as error:
                values.pop(key, None)
                if _is_foreign_section(full, value):
                    _add_unknown(full, value, [], issues)
                issues.add(full, error.code, f"{error}{hint_for_value(full, value)}")
    for name, f in known.items():
        if name not in given and f.default is MISSING and f.default_factory is MISSING:
            explanation = f": {f.metadata['help']}" if f.metadata.get("help") else "."
            issues.add(f"{path}{name}", "missing-option", f"is required. Set it{explanation}")
        if name not in values and is_dataclass(hints[name]):
            values[name] = check_types(hints[name], {}, f"{path}{name}.", issues)
    return values


def _value(hint: Any, value: Any, key: str, issues: ConfigIssues) -> Any:
    """Return `value` as type `hint`: a dict for a dataclass, a list of them, or a leaf. Raise _InvalidValue."""
    args = typing.get_args(hint)
    if is_dataclass(hint):
        if isinstance(value, dict):
            return check_types(hint, value, f"{key}.", issues)
        names = ", ".join(f.name for f in fields(hint))
        message = f"expected {WORDS[dict]} ({names}), got {format_value(value)}.{hint_for_value(key, value)}"
        issues.add(key, "wrong-type", message)
        return {}
    if typing.get_origin(hint) is list and is_dataclass(args[0]) and isinstance(value, list):
        return [_value(args[0], entry, f"{key}[{i}]", issues) for i, entry in enumerate(value)]
    return _leaf(hint, value)


def _leaf(hint: Any, value: Any) -> Any:
    """Return `value` as a type that contains no dataclass. Raise _InvalidValue."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or (value is None and types.NoneType in args):
        return value
    if args == (str, int):
        number = _scalar(int, value)
        if number is None and not isinstance(value, str):
            raise _InvalidValue(f"expected a string or an integer, got {format_value(value)}.", "wrong-type")
        return value if number is None else number
    if origin is types.UnionType:  # X | None, or X | bool
        return value if isinstance(value, bool) and bool in args else _leaf(args[0], value)
    if origin is list and isinstance(value, list):
        return [_leaf(args[0], entry) for entry in value]
    if origin is dict and isinstance(value, dict):
        return {str(name): _leaf(args[1], entry) for name, entry in value.items()}
    converted = _scalar(hint, value)
    if converted is None:
        quotes = " Put it in quotes." if hint is str and type(value) is float else ""
        raise _InvalidValue(
            f"expected {WORDS.get(origin or hint, hint)}, got {format_value(value)}.{quotes}", "wrong-type"
        )
    return converted


def _scalar(type_: type, value: Any) -> bool | int | float | str | None:
    """Return `value` as a bool, int, float or str if that is exact, else None. ``${oc.env:X}`` resolves to strings."""
    if type_ is bool:
        return {"true": True, "false": False}.get(str(value).lower())
    if type_ is str:
        return str(value) if type(value) is int or isinstance(value, (str, Path)) else None
    if type_ not in (int, float) or isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
        if type_ is float:
            return number if math.isfinite(number) else None
        return int(value) if int(number) == number else None
    except (ValueError, OverflowError):
        return None


def check_limits(meta: dict, value: Any) -> None:
    """Raise _InvalidValue for a value that is not a choice of its option, or outside its limits."""
    if value is None or not meta:  # a field without `option` has no limits
        return
    if meta["choices"] and isinstance(value, str) and value not in meta["choices"]:
        hint = suggest(value, meta["choices"])
        numbers = "" if meta["ge"] is None else f" or a number of {meta['ge']} or more"
        raise _InvalidValue(
            f"expected one of {', '.join(meta['choices'])}{numbers}, got {value!r}.{hint}", "not-a-choice"
        )
    if value == "":
        raise _InvalidValue("is empty. Set a value, or remove the option.", "invalid-value")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_bounds(meta, value)


def _check_bounds(meta: dict, value: int | float) -> None:
    largest = MAX_NUMBER if meta["le"] is None and meta["lt"] is None else meta["le"]
    if meta["ge"] is not None and value < meta["ge"]:
        raise _InvalidValue(f"must be {meta['ge']} or more, got {value}.", "out-of-range")
    if meta["gt"] is not None and value <= meta["gt"]:
        raise _InvalidValue(f"must be above {meta['gt']}, got {value}.", "out-of-range")
    if meta["lt"] is not None and value >= meta["lt"]:
        raise _InvalidValue(f"must be below {meta['lt']}, got {value}.", "out-of-range")
    if largest is not None and value > largest:
        raise _InvalidValue(f"must be {largest} or less, got {value}.", "out-of-range")
    if 0 < abs(value) < MIN_FRACTION:
        raise _InvalidValue(
            f"is too close to 0 to have an effect, got {value}. Set 0 or a larger number.", "out-of-range"
        )


# ------------------------------------------------------------------------------------------------ unknown names


def _add_unknown(key: str, value: Any, known: list[str], issues: ConfigIssues) -> None:
    """Add an issue for a key that does not exist, or for its keys if it is a section of another tool."""
    if len(issues.entries) > MAX_HINTS:
        issues.add(key, "unknown-option", "unknown option.")
        return
    if _is_foreign_section(key, value, known):
        for name, inner in value.items():
            _add_unknown(f"{key}.{name}", inner, [], issues)
        return
    hint = hint_for_key(key, value, known)
    issues.add(key, "unknown-option", f"unknown option. {hint.text}")
    suggested = [option for option in hint.options if not issues.source.has(option) and not keys_overlap(option, key)]
    issues.reported.update(suggested)  # these are not reported as missing


def _is_foreign_section(key: str, value: Any, known: Iterable[str] = ()) -> bool:
    """Return whether a value is a section with options of minitrain or another tool, and its name is not a typo."""
    if not isinstance(value, dict) or not any(is_known_elsewhere(str(name)) for name in value):
        return False
    name = key.rpartition(".")[2]
    return is_known_elsewhere(name) or not nearest_names(name, known)
