"""example/notebook.ipynb runs from the first cell to the last one."""

import json
import os

import pytest

from tests.conftest import DEADLINE, ROOT

FILE = ROOT / "example" / "notebook.ipynb"


def test_the_notebook_runs(tmp_path, monkeypatch):
    """It shows log lines, a progress bar and a picture while it trains, and answers."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(FILE, as_version=4)
    notebook.cells[3].source = (
        notebook.cells[3].source.replace('"n_steps": 400', '"n_steps": 20').replace("100,", "10,")
    )
    client = nbclient.NotebookClient(notebook, timeout=DEADLINE, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = {name: "".join(o["text"] for o in outputs if o.get("name") == name) for name in ("stdout", "stderr")}
    assert "step 20/20" in text["stdout"] and "eval at step 10" in text["stdout"]
    assert "/20 [" in text["stderr"]  # the bar
    assert any("image/png" in output.get("data", {}) for output in outputs)
    (answers,) = [o for o in outputs if o.output_type == "execute_result" and "'" in o.data["text/plain"]][-1:]
    assert len(eval(answers.data["text/plain"])) == 2


def test_the_notebook_is_saved_without_outputs():
    cells = json.loads(FILE.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
