"""Suggestions for unknown keys and values, which are those of another tool, or typos."""

import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .schema import LISTS, aliases, all_keys, option_fields
from .sections import DatasetConfig

OTHER_TOOLS = Path(__file__).with_name("other_tools.txt")
OFF = ("no", "none", "off")

# Key of another tool -> the option with a converted value, or "" if the value needs no conversion.
CONVERSIONS: dict[str, Callable[[float], str]] = {
    "validation_split_percentage": lambda value: f"validation_split={value / 100:g}",
    "val_split_percentage": lambda value: f"validation_split={value / 100:g}",
    "warmup_steps": lambda value: f"warmup_ratio={value:g}" if 0 < value < 1 else "",
    "num_warmup_steps": lambda value: f"warmup_ratio={value:g}" if 0 < value < 1 else "",
}


class KeyMapping(NamedTuple):
    """A row of `other_tools.txt`."""

    keys: tuple[str, ...]
    options: tuple[str, ...]  # alternatives in minitrain; empty if it has no such option
    comment: str


class Hint(NamedTuple):
    text: str  # a sentence
    options: tuple[str, ...] = ()  # keys in `text`


def read_tables() -> dict[str, list[KeyMapping]]:
    """Return the rows of each section of `other_tools.txt`."""
    tables: dict[str, list[KeyMapping]] = {}
    text = re.sub(r"^#.*\n", "", OTHER_TOOLS.read_text(encoding="utf-8"), flags=re.M)
    for line in re.sub(r"\n +", " ", text).splitlines():
        if line.startswith("["):
            rows = tables[line.strip("[]")] = []
        elif line:
            keys, _, target = line.partition(" -> ")
            options, _, comment = target.partition(" | ")
            alternatives = () if options == "-" else tuple(options.split(" or "))
            rows.append(KeyMapping(tuple(keys.split(", ")), alternatives, comment))
    return tables


@functools.cache
def _prefixes() -> list[tuple[str, KeyMapping]]:
    """Return (prefix, row) for keys such as `vllm_*`, which match all keys with that prefix."""
    return [(key[:-1], row) for key, row in _rows().items() if key.endswith("*")]


@functools.cache
def _last_names() -> list[str]:
    """Return the names of other tools' options, without sections and values."""
    return sorted({key.partition("=")[0].rpartition(".")[2] for key in _rows() if not key.endswith("*")})


@functools.cache
def _own_last_names() -> frozenset[str]:
    """Return the names of minitrain's options, without sections."""
    return frozenset(_split(key)[1] for key in all_keys())


def is_known_elsewhere(name: str) -> bool:
    """Return whether another tool has an option of this name, or minitrain has it in any section."""
    return name in _last_names() or name in _own_last_names()


def hint_for_key(key: str, value: Any, known: list[str]) -> Hint:
    """Return a hint about an unknown key. `known` are the names of the options in its section."""
    section, name = _split(key)
    if row := _find_row(key, value):
        return _hint_from(*row, key, value)
    if similar := _similar_keys(section, name, known):
        return Hint(f"Did you mean {' or '.join(similar)}?", tuple(similar))
    if len(name) > 4 and (near := nearest_names(name, _last_names())) and (row := _find_row(near[0], value)):
        return _hint_from(*row, key, value)
    if row := next((row for prefix, row in _prefixes() if name.startswith(prefix)), None):
        return _hint_from(row, False, key, value)
    return Hint(f"Valid options: {', '.join(known)}." if 0 < len(known) <= 12 else "docs/options.md lists all options.")


def hint_for_value(key: str, value: Any, choices: Iterable[str] = ()) -> str:
    """Return `` Use ...`` for another tool's value of the option `key`, else the nearest choice or an empty string."""
    if key == "model" and isinstance(value, str):
        return f" Use model.name_or_path={value}."
    if converted := _convert_value(key, value):
        return f" Use {converted}."
    row = _rows().get(f"{_without_index(key)}={_as_key(value)}")
    return f" {_hint_from(row, True, key, value).text}" if row else suggest(str(value), choices)


def _split(key: str) -> tuple[str, str]:
    section, dot, name = key.rpartition(".")
    return section + dot, name


def _without_index(key: str) -> str:
    return re.sub(r"^(eval_)?datasets\[\d+\]", "datasets", key)


def _as_key(value: Any) -> str:
    """Return a value as the keys of `other_tools.txt` write it."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    return "null" if value is None else str(value).lower().replace("false", "no")  # YAML reads `no` as false


@functools.cache
def _rows() -> dict[str, KeyMapping]:
    """Return the row of each key."""
    rows = [row for rows in read_tables().values() for row in rows]
    return {key.replace("=false", "=no"): row for row in rows for key in row.keys}


def _find_row(key: str, value: Any) -> tuple[KeyMapping, bool] | None:
    """Return the row of a key, or of its name without the section, and whether it is for this value only."""
    rows, path = _rows(), _without_index(key)
    name = _split(path)[1]
    for spelling in (path, name, name.lower().replace("-", "_")):
        for candidate, has_value in ((f"{spelling}={_as_key(value)}", True), (spelling, False)):
            if candidate in rows and rows[candidate].options != (key,):
                return rows[candidate], has_value
    return None


def _convert_value(key: str, value: Any) -> str:
    """Return the option with the converted value, or an empty string."""
    convert = CONVERSIONS.get(_split(key)[1])
    try:
        return convert(float(value)) if convert and not isinstance(value, bool) else ""
    except (TypeError, ValueError):
        return ""


def _hint_from(row: KeyMapping, has_value: bool, key: str, value: Any) -> Hint:
    """Return the hint of a row about a key. `has_value` is True if the row is for this value only."""
    entry = re.match(r"(eval_)?datasets\[\d+\]", key)
    suggestion = " or ".join(row.options).replace("VALUE", _as_key(value))
    suggestion = suggestion.replace("datasets[0]", entry[0]) if entry else suggestion
    options = tuple(word.partition("=")[0] for word in suggestion.split() if word != "or")
    if converted := _convert_value(key, value):
        return Hint(f"Use {converted}.", (*options, converted.partition("=")[0]))
    if value is None and not has_value:
        return Hint("Remove it: without a value it has no effect.")
    if not has_value and _as_key(value) in OFF and row.options and "=" in row.options[0]:
        return Hint("Remove it: it is off by default.")
    if not row.options:
        return Hint(f"Remove it: {row.comment}.")
    return Hint(f"Use {suggestion}{f' ({row.comment})' if row.comment else ''}.", options)


def _similar_keys(section: str, name: str, known: list[str]) -> list[str]:
    """Return the keys of options with a similar name: in the same section, in another one, or after a typo."""
    entries = [f"datasets[0].{f.name}" for f in option_fields(DatasetConfig)]
    everywhere = [*all_keys(), *(entries if not section.startswith(LISTS) else [])]
    normalized = _normalize(name)
    if here := [option for option in known if _normalize(option) == normalized]:
        return [section + here[0]]
    if not section and (
        alias := next((option for alias, option in aliases().items() if _normalize(alias) == normalized), None)
    ):
        return [alias]
    if same := [key for key in everywhere if _normalize(_split(key)[1]) == normalized or _normalize(key) == normalized]:
        return same[:3]
    if near := nearest_names(name, known):
        return [section + option for option in near]
    near = nearest_names(name, {_split(key)[1] for key in everywhere}) if len(name) > 4 else []
    return [key for key in everywhere if _split(key)[1] in near][:3]


def _normalize(name: str) -> str:
    return re.sub(r"[-_. ]", "", name).lower()


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean ...?`` with the nearest known names, or an empty string."""
    known = list(known)
    near = [option for option in known if _normalize(option) == _normalize(name)][:1] or nearest_names(name, known)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def nearest_names(name: str, known: Iterable[str]) -> list[str]:
    """Return the known names of which `name` may be a typo, if they are at most two."""
    distances = {other: _distance(name, other) for other in known if _is_typo(name, other)}
    near = [other for other, distance in distances.items() if distance == min(distances.values())]
    return near if len(near) <= 2 else []


def _is_typo(name: str, known: str) -> bool:
    """Return whether each word of a name is similar to that of the known one: `use_eaft` is not `use_peft`."""
    words, others = re.split(r"[-_./ ]", name), re.split(r"[-_./ ]", known)
    if len(words) != len(others) or re.sub(r"\D", "", name) != re.sub(r"\D", "", known):
        return False
    return all(_is_near(a, b, alone=len(words) == 1) for a, b in zip(words, others, strict=True))


def _is_near(word: str, other: str, alone: bool) -> bool:
    """Return whether two words differ by a plural s or by one letter, or by two letters in long words."""
    if word.removesuffix("s") == other.removesuffix("s") or (len(word) > 1 and sorted(word) == sorted(other)):
        return _distance(word, other) <= 1
    length = max(len(word), len(other))
    return length >= (3 if alone else 5) and _distance(word, other) <= (2 if length >= 8 else 1)


def _distance(a: str, b: str) -> int:
    """Return the number of letters to insert, delete, replace or swap with a neighbor to get from `a` to `b`."""
    before, last = [], list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            least = min(last[j] + 1, row[-1] + 1, last[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                least = min(least, before[j - 2] + 1)
            row.append(least)
        before, last = last, row
    return last[-1]
