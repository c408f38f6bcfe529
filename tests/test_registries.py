"""What is registered is documented: each loss, row format, schedule and command has its place in docs/."""

import re

import pytest

from minitrain.cli.main import CONFIG_COMMANDS, _parser
from minitrain.data.encode import N_DOCUMENTS
from minitrain.data.examples import MAPPED, SCHEMAS
from minitrain.losses import registered
from minitrain.losses.base import Loss
from tests.cli.test_imports import COMMANDS
from tests.conftest import ROOT
from tests.rows import ROWS

LOSSES = {name: loss for name, loss in registered().items() if loss.__module__.startswith("minitrain.")}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_a_section(name):
    """In docs/losses.md, with its unit."""
    assert re.search(rf"^## {name} \(unit: ", (ROOT / "docs" / "losses.md").read_text(), re.M)


def test_each_kind_of_rows_has_what_it_needs():
    """Rows for the tests, an example of a mapping, a number of documents, and a loss that learns from it."""
    kinds = {one.kind for one in SCHEMAS.values()}
    assert kinds == set(ROWS) == set(MAPPED) == set(N_DOCUMENTS) == {loss.example_type for loss in LOSSES.values()}
    assert all(issubclass(loss, Loss) for loss in LOSSES.values())


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_row_format_has_a_line(name):
    """A row of a table in docs/data.md names all its keys; of conversations, its type as well."""
    page, one = (ROOT / "docs" / "data.md").read_text(), SCHEMAS[name]
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    if one.kind == "conversation":
        lines = [line for line in lines if line.startswith(f"| `{name}` |")]
    assert any(set(one.required) <= set(re.findall(r"\w+", line)) for line in lines)


def test_the_commands_that_take_a_config():
    """`--config FILE` works for each of them."""
    takes = {name for name, parser in COMMANDS.items() if "--overrides" in parser._option_string_actions}
    assert takes == set(CONFIG_COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_explains_itself(name):
    """Each of its arguments has a help, and its description is a sentence."""
    parser = COMMANDS[name]
    assert parser.description.endswith(".") and parser.usage and callable(parser.get_default("command"))
    assert [action.dest for action in parser._actions if not action.help and action.dest != "configs"] == []
    assert name in _parser("minitrain").format_help()
