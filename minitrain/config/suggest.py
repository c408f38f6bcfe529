"""What a user may have meant by a key or value that minitrain does not have: another tool's, or a typo."""

import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .schema import aliases, all_keys, option_fields
from .sections import DatasetConfig

OTHER_TOOLS = Path(__file__).with_name("other_tools.txt")
OFF = ("no", "none", "off")

# Options whose value is calculated, by the key of another tool.
CONVERSIONS: dict[str, Callable[[float], str]] = {
    "validation_split_percentage": lambda value: f"validation_split={value / 100:g}",
    "val_split_percentage": lambda value: f"validation_split={value / 100:g}",
    "warmup_steps": lambda value: f"warmup_ratio={value:g}" if 0 < value < 1 else "",
    "num_warmup_steps": lambda value: f"warmup_ratio={value:g}" if 0 < value < 1 else "",
}


class Row(NamedTuple):
    """A row of `other_tools.txt`."""

    keys: tuple[str, ...]
    ours: tuple[str, ...]  # alternatives; none where there is no such option here
    note: str


class Hint(NamedTuple):
    text: str  # what to do, in a sentence
    options: tuple[str, ...] = ()  # keys that it names


def read_tables() -> dict[str, list[Row]]:
    """Return the rows of `other_tools.txt` by section."""
    tables: dict[str, list[Row]] = {}
    text = re.sub(r"^#.*\n", "", OTHER_TOOLS.read_text(encoding="utf-8"), flags=re.M)
    for line in re.sub(r"\n +", " ", text).splitlines():
        if line.startswith("["):
            rows = tables[line.strip("[]")] = []
        elif line:
            keys, _, meant = line.partition(" -> ")
            ours, _, note = meant.partition(" | ")
            rows.append(Row(tuple(keys.split(", ")), () if ours == "-" else tuple(ours.split(" or ")), note))
    return tables


@functools.cache
def _prefixes() -> list[tuple[str, Row]]:
    """Return the rows of keys like `vllm_*`, which are about all keys with this beginning."""
    return [(key[:-1], row) for key, row in _rows().items() if key.endswith("*")]


@functools.cache
def _last_names() -> list[str]:
    """The names that other tools have, without sections and values."""
    return sorted({key.partition("=")[0].rpartition(".")[2] for key in _rows() if not key.endswith("*")})


@functools.cache
def _own_last_names() -> frozenset[str]:
    """Return the names of minitrain's options, without sections."""
    return frozenset(_split(key)[1] for key in all_keys())


def is_known_elsewhere(name: str) -> bool:
    """Return whether other tools have a key of this name, or minitrain has it in some section."""
    return name in _last_names() or name in _own_last_names()


def hint_for_key(key: str, value: Any, known: list[str]) -> Hint:
    """Return what to do about a key that does not exist. `known` are the names that exist in its section."""
    section, name = _split(key)
    if row := _find_row(key, value):
        return _hint_of(*row, key, value)
    if meant := _own_keys(section, name, known):
        return Hint(f"Did you mean {' or '.join(meant)}?", tuple(meant))
    if len(name) > 4 and (near := nearest_names(name, _last_names())) and (row := _find_row(near[0], value)):
        return _hint_of(*row, key, value)
    if row := next((row for prefix, row in _prefixes() if name.startswith(prefix)), None):
        return _hint_of(row, False, key, value)
    return Hint(f"There are {', '.join(known)}." if 0 < len(known) <= 12 else "docs/options.md lists all options.")


def hint_for_value(key: str, value: Any, choices: Iterable[str] = ()) -> str:
    """Return `` Use ...`` for another tool's value of our own option `key`, else the nearest choice, or nothing."""
    if key == "model" and isinstance(value, str):
        return f" Use model.name_or_path={value}."
    if converted := _converted(key, value):
        return f" Use {converted}."
    row = _rows().get(f"{_without_index(key)}={_as_key(value)}")
    return f" {_hint_of(row, True, key, value).text}" if row else suggest(str(value), choices)


def _split(key: str) -> tuple[str, str]:
    section, dot, name = key.rpartition(".")
    return section + dot, name


def _without_index(key: str) -> str:
    return re.sub(r"^(eval_)?datasets\[\d+\]", "datasets", key)


def _as_key(value: Any) -> str:
    """Return a value as the keys of `other_tools.txt` have it."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    return "null" if value is None else str(value).lower().replace("false", "no")  # YAML reads `no` as false


@functools.cache
def _rows() -> dict[str, Row]:
    """Return the row of each key."""
    rows = [row for rows in read_tables().values() for row in rows]
    return {key.replace("=false", "=no"): row for row in rows for key in row.keys}


def _find_row(key: str, value: Any) -> tuple[Row, bool] | None:
    """Return the row of a key, or of its name without the section, and whether it is about this very value."""
    rows, path = _rows(), _without_index(key)
    name = _split(path)[1]
    for one in (path, name, name.lower().replace("-", "_")):
        for wanted, has_value in ((f"{one}={_as_key(value)}", True), (one, False)):
            if wanted in rows and rows[wanted].ours != (key,):
                return rows[wanted], has_value
    return None


def _converted(key: str, value: Any) -> str:
    """Return the option with the calculated value, or nothing."""
    convert = CONVERSIONS.get(_split(key)[1])
    try:
        return convert(float(value)) if convert and not isinstance(value, bool) else ""
    except (TypeError, ValueError):
        return ""


def _hint_of(row: Row, has_value: bool, key: str, value: Any) -> Hint:
    """Return what a row says about a key. `has_value`: it is about this very value."""
    entry = re.match(r"(eval_)?datasets\[\d+\]", key)
    ours = " or ".join(row.ours).replace("VALUE", _as_key(value))
    ours = ours.replace("datasets[0]", entry[0]) if entry else ours
    options = tuple(one.partition("=")[0] for one in ours.split() if one != "or")
    if converted := _converted(key, value):
        return Hint(f"Use {converted}.", (*options, converted.partition("=")[0]))
    if value is None and not has_value:
        return Hint("Remove it: without a value it has no effect.")
    if not has_value and _as_key(value) in OFF and row.ours and "=" in row.ours[0]:
        return Hint("Remove it: it is off by default.")
    if not row.ours:
        return Hint(f"Remove it: {row.note}.")
    return Hint(f"Use {ours}{f' ({row.note})' if row.note else ''}.", options)


def _own_keys(section: str, name: str, known: list[str]) -> list[str]:
    """Return own options that are spelled alike: in the same section, in another one, or with a typo."""
    entries = [f"datasets[0].{f.name}" for f in option_fields(DatasetConfig)]
    everywhere = [*all_keys(), *(entries if not section.startswith(("datasets", "eval_datasets")) else [])]
    plain = _plain(name)
    if here := [one for one in known if _plain(one) == plain]:
        return [section + here[0]]
    if not section and (alias := next((own for alias, own in aliases().items() if _plain(alias) == plain), None)):
        return [alias]
    if same := [key for key in everywhere if _plain(_split(key)[1]) == plain or _plain(key) == plain]:
        return same[:3]
    if near := nearest_names(name, known):
        return [section + one for one in near]
    near = nearest_names(name, {_split(key)[1] for key in everywhere}) if len(name) > 4 else []
    return [key for key in everywhere if _split(key)[1] in near][:3]


def _plain(name: str) -> str:
    return re.sub(r"[-_. ]", "", name).lower()


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean ...?`` with the nearest of the known names, or nothing."""
    known = list(known)
    near = [one for one in known if _plain(one) == _plain(name)][:1] or nearest_names(name, known)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def nearest_names(name: str, known: Iterable[str]) -> list[str]:
    """Return the one or two known names that `name` can be a typo of."""
    distances = {one: _distance(name, one) for one in known if _is_typo(name, one)}
    near = [one for one, distance in distances.items() if distance == min(distances.values())]
    return near if len(near) <= 2 else []


def _is_typo(name: str, known: str) -> bool:
    """Return whether each word of a name is that of the known one, or near to it: `use_eaft` is not `use_peft`."""
    words, others = re.split(r"[-_./ ]", name), re.split(r"[-_./ ]", known)
    if len(words) != len(others) or re.sub(r"\D", "", name) != re.sub(r"\D", "", known):
        return False
    return all(_is_near(a, b, alone=len(words) == 1) for a, b in zip(words, others, strict=True))


def _is_near(word: str, other: str, alone: bool) -> bool:
    """Return whether two words differ in their plural, or in a letter; in two where they are long."""
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
