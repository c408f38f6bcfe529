"""Other tools' keys: a row of the table names what there is, each key leads to its row, and the page says the same."""

import ast
import functools
import importlib
import json
import re
from dataclasses import fields

import pytest
import transformers
import yaml

from minitrain import ConfigError, load_config
from minitrain.config.schema import Config, aliases, all_keys, option_fields
from minitrain.config.suggest import KeyMapping, hint_for_key, hint_for_value, read_tables
from minitrain.losses import registered
from tests.conftest import ROOT
from tests.test_docs import problems_of, problems_of_items, tables

PAGES = [ROOT / "docs" / name for name in ("migrating.md", "migrating-grpo.md")]

TABLES = read_tables()
ROWS = [(name, row) for name, rows in TABLES.items() for row in rows]
OWN = {*all_keys(), *aliases()}
OWN |= {f"loss.{f.name}" for loss in registered().values() for f in fields(loss.options_class)}


def value_of(key: str) -> tuple[str, object]:
    """``("a", True)`` of ``a=true``, ``("a", "some value")`` of ``a``."""
    name, is_given, value = key.replace("*", "of_some_kind").partition("=")
    values = {"true": True, "false": False, "no": False, "null": None}
    return name, values.get(value, value) if is_given else "some value"


def filled(ours: str, key: str) -> str:
    return ours.replace("VALUE", key.partition("=")[2])


def test_a_key_is_in_one_row():
    """In two it would have two meanings, of which one is never seen."""
    keys = [key.replace("=false", "=no") for _, row in ROWS for key in row.keys]
    assert len(keys) == len(set(keys)) > 800 and keys == [key.strip().lower() for key in keys]


def test_other_tools_keys_are_not_ours():
    """A key that minitrain has itself is accepted, and a row about it would never be seen; values of one may differ."""
    assert [key for name, row in ROWS for key in row.keys if key in OWN and not key.startswith("loss.")] == []
    known = {*OWN, "loss.name", "datasets.type"}
    assert [key for row in TABLES["values"] for key in row.keys if key.partition("=")[0] not in known] == []


@pytest.mark.parametrize(("table", "row"), ROWS, ids=[row.keys[0] for _, row in ROWS])
def test_what_a_row_names_exists(table, row: KeyMapping):
    """Every option and value that is suggested passes the schema; a row without one says why."""
    assert row.options or row.comment
    assert [told for key in row.keys for ours in row.options for told in problems_of(filled(ours, key))] == []


@pytest.mark.parametrize(("table", "row"), ROWS, ids=[row.keys[0] for _, row in ROWS])
def test_every_key_leads_to_its_row(table, row: KeyMapping):
    """The hint for a key says what its row says, at the top level and, where it has no section, inside of one."""
    for key in row.keys:
        name, value = value_of(key)
        name = name.replace("datasets.", "datasets[0].")
        hints = [hint_for_value(name, value)] if table == "values" else [hint_for_key(name, value, []).text]
        if table != "values" and "." not in name:
            hints.append(hint_for_key(f"training.{name}", value, []).text)
        for hint in hints:
            assert all(filled(ours, key) in hint for ours in row.options) and row.comment in hint
            assert hint.strip().startswith("Use" if row.options else "Remove it: ")


def test_a_key_that_is_off_is_removed():
    """Where `true` means one fixed value here, `false` means to leave it out, and never that value."""
    switches = [key for _, row in ROWS for key in row.keys if row.options and "=" in row.options[0] and "=" not in key]
    assert len(switches) > 30
    exact = {key for _, row in ROWS for key in row.keys}
    for key in switches:
        if not {f"{key}=false", f"{key}=no"} & exact:
            assert hint_for_key(key, False, []).text == "Remove it: it is off by default.", key


def test_switches_are_off_by_default():
    """So "it is off by default" is true: the default is another value than the one that the row fixes."""
    config = load_config({"model": {"name_or_path": "tiny"}, "datasets": "example/data/skills-train.jsonl"})
    exact = {key.partition("=")[0] for _, row in ROWS for key in row.keys if key.endswith(("=false", "=no"))}
    rows = [row for _, row in ROWS if any("=" not in key and key not in exact for key in row.keys)]
    fixed = [pair.partition("=") for row in rows for ours in row.options for pair in ours.split()[:1] if "=" in pair]
    fixed = [(key, value) for key, _, value in fixed if not key.startswith(("loss.", "datasets"))]
    assert len(fixed) > 20
    for key, value in fixed:
        default = functools.reduce(getattr, key.split("."), config)
        assert str(default).lower() != value.lower(), key


TRL_KEYS = json.loads((ROOT / "tests" / "config" / "trl_keys.json").read_text())  # without those of TrainingArguments
ONLINE_TRAINERS = ("trl.GRPOConfig", "trl.RLOOConfig")


@pytest.mark.parametrize("config_class", TRL_KEYS)
def test_every_key_of_trl_is_answered(config_class):
    """Each option of TRL's trainers, with those of TrainingArguments, is ours or has a hint that is not a guess."""
    exact = {key.partition("=")[0] for _, row in ROWS for key in row.keys}
    prefixes = tuple(key[:-1] for key in exact if key.endswith("*"))
    inherited = [f.name for f in fields(transformers.TrainingArguments)]
    unanswered = [
        key
        for key in (*inherited, *TRL_KEYS[config_class])
        if key not in OWN | exact
        and not key.startswith(prefixes)
        and "Did you mean" not in hint_for_key(key, 1, []).text
    ]
    assert unanswered == []


def test_the_page_about_grpo_has_every_key():
    """Keys of the trainers that sample are on their own page, not only somewhere in the tables."""
    keys = re.findall(r"`([\w*]+)(?:: [\w.]+)?`", PAGES[1].read_text())
    prefixes = tuple(key[:-1] for key in keys if key.endswith("*"))
    for name in ONLINE_TRAINERS:
        assert [key for key in TRL_KEYS[name] if key not in keys and not key.startswith(prefixes)] == []


@pytest.mark.filterwarnings("ignore:You are importing from .trl.experimental")
@pytest.mark.parametrize("config_class", TRL_KEYS)
def test_the_keys_are_those_of_trl(config_class):
    """The list above has every option of the installed TRL, if there is one."""
    pytest.importorskip("trl")
    module, _, name = config_class.rpartition(".")
    theirs = {f.name for f in fields(getattr(importlib.import_module(module), name))}
    assert sorted(theirs - {f.name for f in fields(transformers.TrainingArguments)} - {*TRL_KEYS[config_class]}) == []


def test_nothing_ends_in_a_traceback_by_an_odd_value():
    """Hints are made of any value that YAML has."""
    for key in ("validation_split_percentage", "report_to", "datasets", "optimizer", "peft", "training", "model"):
        for value in (None, True, 3, -0.5, "", "x" * 99, [], [None], [{}], {}, {"a": {"b": []}}, {"method": [1]}):
            with pytest.raises(ConfigError):
                load_config({"zzz": 1, key: value})


def test_every_option_with_choices_is_known_by_a_hint():
    """A value near to a choice is corrected."""
    for f in option_fields(Config):
        for choice in f.metadata["choices"]:
            with pytest.raises(ConfigError, match=f"Did you mean .*{choice}"):
                load_config({"model": {"name_or_path": "tiny"}, f.name: f"{choice}s"})


# -------------------------------------------------------------------------------------------- docs/migrating*.md


def test_the_pages_have_every_table():
    """Each section of the table is in one, but for values of our own options."""
    text = "".join(page.read_text() for page in PAGES)
    assert sorted(re.findall(r"<!-- generated: (\S+) -->", text)) == sorted(TABLES.keys() - {"values"})


def test_commands_and_options_of_the_page_exist():
    """The second column of the tables that are written by hand holds commands, overrides, and Python."""
    rows = [row for page in PAGES for row in tables(page, ["there", "here"])]
    assert len(rows) > 40
    for place, here in rows:
        python = [item for item in here if re.match(r"trainer\.|Trainer\(", item)]
        assert problems_of_items(place, [item for item in here if item not in python]) == []
        assert here and all(ast.parse(item) for item in python), place


def leaves(value, path: str) -> list[str]:
    """The keys of a section, below it too; a list of data sets by its first entry."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return leaves(value[0], f"{path}[0]")
    if not isinstance(value, dict) or path.endswith("column_map"):
        return [path]
    return [leaf for name, inner in value.items() for leaf in leaves(inner, f"{path}.{name}".lstrip("."))]


@pytest.mark.parametrize("block", re.findall(r"```yaml\n# there: (.*?)```", PAGES[0].read_text(), re.S))
def test_a_file_of_another_tool_is_translated(block):
    """One error has a suggestion for each key that minitrain has not, and complains about nothing else."""
    theirs = yaml.safe_load(block.partition("\n")[2])
    with pytest.raises(ConfigError) as error:
        load_config(theirs)
    lines = str(error.value).splitlines()[1:]
    said = {line.split(": ")[1]: line for line in lines}
    assert len(said) == len(lines) >= 9
    accepted = OWN | {"datasets[0].path", "datasets[0].type"}
    assert [key for key in leaves(theirs, "") if key not in said and key not in accepted] == []
    for line in lines:
        assert re.search(r" Use | Remove it: | Did you mean ", line), line
