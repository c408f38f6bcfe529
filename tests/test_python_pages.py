"""The code of the pages on Python runs as it is written."""

import shutil

import pytest

from tests.conftest import ROOT
from tests.test_docs import blocks

PAGES = {"python.md": 2, "own-loop.md": 3}  # with the number of blocks


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_the_page_runs(page, tmp_path, monkeypatch, capsys):
    """Each block by itself, in a folder with the examples."""
    shutil.copytree(ROOT / "example", tmp_path / "example")
    monkeypatch.chdir(tmp_path)
    found = blocks(ROOT / "docs" / page, "python")
    assert len(found) == PAGES[page]
    for block in found:
        exec(compile(block, page, "exec"), {"__name__": "page"})
    assert capsys.readouterr().out
