"""The order of tests in a run of several processes."""

import os
import re
import shutil
import subprocess
import sys

from tests.conftest import DEADLINE, ROOT

STUBS = """
import pytest
@pytest.mark.parametrize("i", range(60))
def test_quick(i): pass
@pytest.mark.slow
@pytest.mark.parametrize("i", range(6))
def test_slow(i): pass
@pytest.mark.parametrize("i", [pytest.param(i, marks=pytest.mark.slow(minutes=i)) for i in (2, 9, 5, 7)])
def test_long(i): pass
"""


def test_each_process_begins_with_the_longest_tests(tmp_path):
    """As xdist itself cuts the list: four long tests are the first of four processes, and a quick one follows each."""
    (tmp_path / "test_stubs.py").write_text(STUBS)
    (tmp_path / "conftest.py").write_text("from tests.order import pytest_collection_modifyitems\n")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = [sys.executable, "-m", "pytest", "-vv", "-n", "4", "--dist", "worksteal", "-p", "no:cacheprovider"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "-m", "", "."], cwd=tmp_path, env=environment, capture_output=True, text=True)
    ran = re.findall(r"\[(gw\d)\] .*PASSED.*::test_(\w+)\[(\d+)\]", done.stdout)
    assert len(ran) == len(set(ran)) == 70, done.stdout + done.stderr
    by_process = {name: [(kind, i) for who, kind, i in ran if who == name] for name in ("gw0", "gw1", "gw2", "gw3")}
    assert {tests[0] for tests in by_process.values()} == {("long", i) for i in "2957"}
    assert {tests[1][0] for tests in by_process.values()} == {"quick"}


def test_a_test_that_hangs_fails_and_the_others_run(tmp_path):
    stubs = STUBS + "def test_hangs():\n    import threading\n    threading.Event().wait()\n"
    (tmp_path / "test_stubs.py").write_text(stubs)
    settings = (ROOT / "pyproject.toml").read_text()
    assert "timeout = 600 " in settings
    settings = settings.replace("timeout = 600", "timeout = 2").replace("timeout = 590", "timeout = 1")
    (tmp_path / "pyproject.toml").write_text(settings)
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider", "."]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 1 and "60 passed" in done.stdout and "1 failed" in done.stdout, done.stdout + done.stderr
    assert "test_stubs.py::test_hangs" in done.stdout
    assert "in test_hangs" in done.stderr
