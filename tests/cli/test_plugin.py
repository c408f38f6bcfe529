"""A user's own loss, from a file of theirs, named in a config."""

import json
import re

import pytest

from minitrain.cli.main import main
from tests.cli.test_commands import run
from tests.conftest import ROOT
from tests.messages import reports

CODE = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "losses.md").read_text(), re.S)[1]


@pytest.fixture
def config(tmp_path, rows_file):
    file = tmp_path / "c.yml"
    file.write_text(
        f"datasets: {rows_file}\nmodel: {{name_or_path: tiny}}\nn_steps: 2\noutput_dir: {tmp_path}\n"
        "loss: {name: top_heavy, power: 3}\n"
    )
    return file


def test_the_loss_of_the_documentation(tmp_path, config):
    """The example of docs/losses.md trains when its file is named on the command line."""
    (tmp_path / "my_loss.py").write_text(CODE)
    done = run("train.py", config, "--plugin", tmp_path / "my_loss.py", "--overrides", "lr=1e-3")
    assert done.returncode == 0, done.stderr
    assert "loss top_heavy" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "c" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] > 20  # (-log 1/259)^3 is 171


def test_a_config_alone_runs_no_code(config, capsys):
    """Without --plugin the name is unknown, and no key of a config can name a file."""
    assert main(["train", str(config)]) == 2
    assert reports(capsys.readouterr().err, "not-a-choice", "loss.name: ", "'top_heavy'")
    assert main(["train", str(config), "--overrides", "plugin=x.py"]) == 2
    assert reports(capsys.readouterr().err, "unknown-option", "plugin: ")


@pytest.mark.parametrize(
    "code, problem, about",
    [
        ("import nonsense_module", "plugin-failed", "p.py:1: ModuleNotFoundError: "),
        ("x = 1\ny = x / 0", "plugin-failed", "p.py:2: ZeroDivisionError: "),
        ("def f(:", "plugin-failed", "p.py:1: "),
        (
            "from minitrain import register_loss\nregister_loss('sft', int)(type('A', (), {}))",
            "already-exists",
            "'sft'",
        ),
    ],
)
def test_a_plugin_that_fails(tmp_path, config, capsys, code, problem, about):
    """Its line and error, without a traceback."""
    (tmp_path / "p.py").write_text(code)
    assert main(["train", str(config), "--plugin", str(tmp_path / "p.py")]) == 2
    message = capsys.readouterr().err
    assert reports(message, problem, about) and "Traceback" not in message


def test_a_plugin_that_is_not_there(config, capsys):
    """A missing file, or one that is no Python."""
    for name in ("gone.py", str(config)):
        assert main(["train", str(config), "--plugin", name]) == 2
        assert reports(capsys.readouterr().err, "not-found", "--plugin: ", name)
