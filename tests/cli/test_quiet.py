"""--quiet: no bars and no lines of information, but results, warnings and errors."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from minitrain.cli.main import main
from tests.commands import CASES, KD, PARSERS
from tests.messages import reports


@pytest.fixture
def say(folder, capsys, monkeypatch):
    """``say("train", "c.yml")``: (stdout, stderr) of a command that ends well, on a terminal, which shows bars."""

    def say(*arguments: str) -> tuple[str, str]:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        assert main(list(arguments)) == 0
        return tuple(capsys.readouterr())

    say("train", "c.yml", "--quiet", "--overrides", "exp_name=lora", "lora.rank=2")
    return say


def test_bars_are_there_without_it(say):
    """The fixture shows what the others look for: a bar of the steps, and one of the tokenization."""
    Path("rows.jsonl").write_text('{"prompt": "other", "response": "rows"}\n')
    out, err = say("train", "c.yml")
    assert "done: out/c/final" in out and "tokenizing rows.jsonl" in err and "step/s" in err


QUIET = [name for name in CASES if "--quiet" in PARSERS[name]._option_string_actions]
SLOW = ("rehearse",)  # starts two trainings


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in QUIET]
)
def test_only_results_are_printed(trained_folder, capsys, monkeypatch, name):
    """No bar and no message, and the work is done."""
    case = CASES[name]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([*case.arguments, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and (out == case.quiet_output or case.quiet_output is None)
    assert Path(case.writes).exists()


def test_a_report_is_not_printed(say):
    """Even --full."""
    assert say("validate", "c.yml", "c.yml", "--full", "--quiet") == ("", "")


def test_results_are_printed(say):
    """Answers and what is learned as without it, of a teacher's outputs the path alone."""
    ask = ["generate", "out/lora", "--prompt", "a", "--max-new-tokens", "1"]
    assert say(*ask, "--quiet") == (say(*ask)[0], "")
    look = ["inspect", "c.yml", "--rows", "1"]
    assert say(*look, "--quiet") == (say(*look)[0], "")
    shutil.copy("rows.jsonl", "again.jsonl")
    out, err = say("teach", "c.yml", *KD, "datasets=[again.jsonl]", "--output", "t.safetensors", "--quiet")
    assert (out, err) == ("t.safetensors\n", "") and Path("t.safetensors").is_file()


def test_scores_are_printed(say):
    """Labels with their probabilities, and no bar."""
    rows = [{"text": f"say {i}", "label": "ab"[i % 2]} for i in range(8)]
    Path("labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    classify = ["--overrides", "loss.name=classify", "datasets=[labels.jsonl]", "exp_name=labels"]
    assert say("train", "c.yml", "--quiet", *classify) == ("", "")
    out, err = say("score", "out/labels", "--text", "a", "b", "--quiet")
    assert len(out.splitlines()) == 2 and err == ""


def test_errors_and_warnings_are_printed(folder, capsys):
    """A wrong option, and rows that are left out."""
    assert main(["train", "c.yml", "--quiet", "--overrides", "lr=x"]) == 2
    assert reports(capsys.readouterr().err, "wrong-type", "lr: ", "'x'")
    Path("rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n{\n' + '{"prompt": "c", "response": "d"}\n' * 2)
    assert main(["train", "c.yml", "--quiet", "--overrides", "on_bad_row=skip"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("skipped rows.jsonl:2: invalid JSON") and len(out.splitlines()) == 1
