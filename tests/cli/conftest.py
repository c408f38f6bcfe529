"""A folder in which a user does something wrong."""

import json
import shutil
from pathlib import Path

import pytest

from minitrain.cli.main import main

CONFIG = """\
datasets: [rows.jsonl]
model: {name_or_path: model}
output_dir: out
batch_size: 8
n_steps: 2
"""
GOOD_ROW = {"prompt": "a", "response": "b"}


@pytest.fixture
def folder(tmp_path, monkeypatch, llama_folder, rows_file):
    """A folder with c.yml, rows.jsonl and model/, which is the current one."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(rows_file, "rows.jsonl")
    shutil.copytree(llama_folder, "model")
    Path("c.yml").write_text(CONFIG)
    return tmp_path


def furnish(folder: Path, llama_folder: Path, rows_file: Path) -> dict:
    """Puts a model, rows and labelled texts into a folder; returns the config of a step on them."""
    shutil.copytree(llama_folder, folder / "model")
    shutil.copy(rows_file, folder / "rows.jsonl")
    rows = [{"text": f"say {i}", "label": "ab"[i % 2]} for i in range(20)]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"datasets": ["rows.jsonl"], "model": {"name_or_path": "./model"}, "output_dir": "runs", "n_steps": 1}


@pytest.fixture
def fails(folder, capsys):
    """``fails("lr=x")``: the message of a training command that exits with 2 and leaves no run behind."""

    def fails(*overrides: str) -> str:
        code = main(["train", "c.yml", *(["--overrides", *overrides] if overrides else [])])
        out, err = capsys.readouterr()
        assert code == 2, err
        assert err.startswith("minitrain: ") and "Traceback" not in err + out and out == ""
        assert not Path("out").exists()
        return err

    return fails


def write(name: str, *rows) -> str:
    """A jsonl file of dicts or of lines as they are; returns the override that trains on it."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    Path(name).write_bytes(b"\n".join(lines) + b"\n" if lines else b"")
    return f"datasets=[{name}]"
