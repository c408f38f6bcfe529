"""What is registered is documented: each loss, row format, schedule and command has its place in docs/."""

import re
import shlex
from dataclasses import fields

import pytest

from minitrain.cli.main import _parser
from minitrain.cli.registry import COMMANDS
from minitrain.data.examples import EXAMPLE_COLUMNS, ROW_FORMATS
from minitrain.losses import create_loss, registered
from minitrain.losses.base import Loss
from tests.commands import CASES, PARSERS
from tests.conftest import ROOT
from tests.rows import REQUIRED, ROWS
from tests.test_docs import problems_of_command

LOSSES = {name: loss for name, loss in registered().items() if loss.__module__.startswith("minitrain.")}
OF_ALL_LOSSES = ("test_invariance", "test_contract")


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_a_section(name):
    """In docs/losses.md, with its unit and all of its options."""
    text = (ROOT / "docs" / "losses.md").read_text()
    section = re.search(rf"^## {name} \(unit: .*?(?=^## )", text, re.M | re.S)
    assert section
    assert [f.name for f in fields(LOSSES[name].options_class) if f"`{f.name}`" not in section[0]] == []


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_a_test_of_its_formula(name):
    """A file of tests/losses/, besides those that run all losses, has its name."""
    files = [file for file in (ROOT / "tests" / "losses").glob("test_*.py") if file.stem not in OF_ALL_LOSSES]
    assert any(re.search(rf'["=]{name}"', file.read_text()) for file in files)


def test_required_options_of_losses_have_values():
    """The tests that run all losses give them, from REQUIRED of tests/rows.py."""
    for name in LOSSES:
        create_loss(name, **REQUIRED.get(name, {}))


def test_each_kind_of_rows_has_what_it_needs():
    """Rows for the tests, an example of a mapping, a number of documents, and a loss that learns from it."""
    kinds = {one.kind for one in ROW_FORMATS.values()}
    assert kinds == set(ROWS) == set(EXAMPLE_COLUMNS)
    assert kinds - {"prompt"} == {loss.example_type for loss in LOSSES.values()}  # prompts: online training
    assert all(issubclass(loss, Loss) for loss in LOSSES.values())


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_a_row_format_has_a_line(name):
    """A row of a table in docs/data.md names all its keys; of conversations, its type as well."""
    page, one = (ROOT / "docs" / "data.md").read_text(), ROW_FORMATS[name]
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    if one.kind == "conversation":
        lines = [line for line in lines if line.startswith(f"| `{name}` |")]
    assert any(set(one.required) <= set(re.findall(r"\w+", line)) for line in lines)


def test_each_command_has_a_case():
    """By it, tests interrupt the command and run it with --quiet."""
    assert CASES.keys() == COMMANDS.keys()
    assert all(name == case.arguments[0] for name, case in CASES.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_explains_itself(name):
    """Its summary can follow its name, and each of its arguments has a help."""
    parser, command = PARSERS[name], COMMANDS[name]
    assert not command.takes_config or "--overrides" in parser._option_string_actions
    assert command.summary[0].islower() and not command.summary.endswith(".")
    assert [action.dest for action in parser._actions if not action.help] == []
    assert name in _parser("minitrain").format_help()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_a_command_is_understood(name):
    """The parser takes it, and its options and overrides exist."""
    program, *arguments = shlex.split(COMMANDS[name].example)
    assert program == "minitrain" and arguments[0] == name
    assert PARSERS[name].parse_args(arguments[1:])
    assert problems_of_command(COMMANDS[name].example) == []
