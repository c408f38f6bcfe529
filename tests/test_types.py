"""What a type checker says about programs that use the public API."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import DEADLINE, ROOT

FOLDER = ROOT / "tests" / "typed"
CONFIG = """
[mypy]
strict = true
# Reading these takes a minute; what is of their types is not checked.
[mypy-torch.*,transformers.*,numpy.*,omegaconf.*,tqdm.*]
follow_imports = skip
"""


def test_a_type_checker_sees_the_public_api(tmp_path):
    """It finds nothing in right.py, and exactly the errors that the comments of wrong.py name."""
    pytest.importorskip("mypy")
    (tmp_path / "mypy.ini").write_text(CONFIG)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # as an installed package, by its py.typed
    files = [str(FOLDER / "right.py"), str(FOLDER / "wrong.py")]
    done = subprocess.run(
        [*command, *files], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=DEADLINE
    )
    reported = re.findall(r"(\w+)\.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.MULTILINE)
    lines = (FOLDER / "wrong.py").read_text().splitlines()
    expected = [("wrong", str(i), line.split("# E: ")[1]) for i, line in enumerate(lines, 1) if "# E: " in line]
    assert sorted(reported) == sorted(expected), done.stdout + done.stderr
