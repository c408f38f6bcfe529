"""The mutations of tests/mutations.py and tests/online_bugs.py: their pages, and the tests that notice them."""

import os
import re
import runpy
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.mutations import BUGS, EXERCISES
from tests.online_bugs import ONLINE_BUGS, ONLINE_MUTATIONS, guards

GENERATOR = runpy.run_path(str(ROOT / "docs" / "generate_mutations.py"))
ALL_BUGS = [bug for section in BUGS.values() for bug in section]
MUTATIONS = [
    pytest.param(mutation, id=f"{kind}{mutation.number}")
    for kind, mutations in (("exercise", EXERCISES), ("bug", ALL_BUGS), ("online", ONLINE_MUTATIONS))
    for mutation in mutations
]


@pytest.mark.parametrize("page", GENERATOR["PAGES"])
def test_the_tables_are_up_to_date(page):
    """They are what the generator makes of the mutations."""
    assert GENERATOR["document"](page) == (ROOT / "docs" / page).read_text(), "run: make docs"


def test_every_mutation_is_on_a_page():
    """Each section of the bugs and the exercises has its region, once."""
    text = "".join((ROOT / "docs" / page).read_text() for page in GENERATOR["PAGES"])
    assert sorted(GENERATOR["REGION"].findall(text)) == sorted([*BUGS, "online", "exercises"])


def test_cells_are_escaped():
    """A pipe does not end a cell, a backtick does not end a code span, and issues become links."""
    assert GENERATOR["code"]("a | b") == "`a \\| b`"
    assert GENERATOR["code"]("a `b`") == "`` a `b` ``"
    assert GENERATOR["links"]("a-b/c.d#12, trl") == "[a-b/c.d#12](https://github.com/a-b/c.d/issues/12), trl"


@pytest.mark.parametrize("mutations", [*BUGS.values(), ONLINE_MUTATIONS, EXERCISES], ids=[*BUGS, "online", "exercises"])
def test_numbers_are_in_order(mutations):
    """A section is sorted by number."""
    numbers = [mutation.number for mutation in mutations]
    assert numbers == sorted(numbers)


def test_every_bug_of_online_rl_has_a_test():
    """And docstrings name no other numbers."""
    assert list(guards()) == list(ONLINE_BUGS) == list(range(1, 49))


def test_numbers_are_unique():
    """No two bugs share a number."""
    numbers = [bug.number for bug in ALL_BUGS]
    assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_line_and_the_test_exist(mutation):
    """The line occurs once in its file, and the test is in its file."""
    assert (ROOT / mutation.file).read_text().count(mutation.line) == 1 and mutation.line != mutation.replacement
    path, _, name = mutation.test.partition("::")
    assert re.search(rf"^def {name or 'test_'}", (ROOT / path).read_text(), re.M)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_mutation_is_noticed(mutation, tmp_path):
    """The named test fails in a copy of the repository with the line replaced."""
    for folder in ("minitrain", "tests", "example"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / mutation.file
    file.write_text(file.read_text().replace(mutation.line, mutation.replacement))
    command = [sys.executable, "-m", "pytest", "-x", "-m", "", "-p", "no:cacheprovider", mutation.test]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True)
    assert done.returncode == 1 and " failed" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
