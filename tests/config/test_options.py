"""The schema: every option is used, explained, within its own limits, and every example passes."""

import ast
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import pytest

from minitrain.config import aliases, issues, schema
from minitrain.errors import ConfigError
from minitrain.losses import registered
from minitrain.tools.preflight.load import load_config

ROOT = Path(__file__).parents[2]
OPTION_CLASSES = [
    *(c for c in vars(schema).values() if is_dataclass(c)),
    *(loss.options_class for loss in registered().values()),
]


def test_every_option_is_read_by_the_code():
    """Each key is accessed as an attribute somewhere outside of the schema."""
    accessed = set()
    for file in (ROOT / "minitrain").rglob("*.py"):
        if file.name != "schema.py":
            accessed |= {n.attr for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Attribute)}
    unread = [f"{c.__name__}.{f.name}" for c in OPTION_CLASSES for f in fields(c) if f.name not in accessed]
    assert unread == []


def test_every_option_is_explained_and_its_default_allowed():
    """Each has a help text, and a default that passes the check of its own limits."""
    for f in (f for c in OPTION_CLASSES for f in schema.option_fields(c)):
        assert f.metadata["help"].endswith("."), f.name
        if f.default is not MISSING:
            issues.check_limits(f.metadata, f.default)


def test_foreign_names_lead_to_options_that_exist():
    """Every name that is suggested to users of other libraries is a key, and no key is taken for a foreign name."""
    losses = {f"loss.{f.name}" for loss in registered().values() for f in fields(loss.options_class)}
    entries = {f"datasets[0].{f.name}" for f in fields(schema.DatasetConfig)}
    known = {*schema.all_keys(), *losses, "loss.name", *entries}
    for name, ours in aliases.FOREIGN_NAMES.items():
        assert name not in {f.name for f in fields(schema.Config)}
        for key in ours.split(" (")[0].replace(", or ", " or ").split(" or "):
            assert key.partition("=")[0] in known, name


def test_names_that_nobody_needs():
    """They are no keys, have no translation, and are told to be left out, with the reason."""
    keys = {key.rpartition(".")[2] for key in schema.all_keys()}
    assert not aliases.NEEDLESS.keys() & (keys | aliases.FOREIGN_NAMES.keys())
    with pytest.raises(ConfigError, match=r"model.block_name: .* none is needed: the model's blocks are found"):
        load_config({"model": {"name_or_path": "tiny", "block_name": "GPTNeoXLayer"}})


def test_a_loss_that_is_a_variant_of_another():
    """`loss: ipo`, as others have it, names the family."""
    with pytest.raises(ConfigError, match=r"Did you mean loss\.name=dpo loss\.variant=ipo"):
        load_config({"model": {"name_or_path": "tiny"}, "loss": "ipo"})


@pytest.mark.parametrize("example", sorted((ROOT / "example").rglob("*.yml")), ids=lambda path: path.name)
def test_every_example_passes(example, monkeypatch):
    """Each config under example/ is free of problems, seen from the root of the project."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TEACHER", "tiny")  # in the place of the one that another example leaves
    load_config(example)
