"""bench/gpu.py: its tables and limits, and all of its measurements on a CPU with tiny models."""

import json
import subprocess
import sys
import time
from dataclasses import asdict

import pytest

from tests.conftest import DEADLINE, ROOT

BENCH = ROOT / "bench"
# A worker that records steps, then does not end, fails or is refused, as the name of its row says.
WORKER = """
import json, pathlib, sys, time
job = json.loads(pathlib.Path(sys.argv[1]).read_text())
found = {"tokens": 100, "squares": 1000, "seconds": [9.0, 0.5, 0.25, 0.5], "losses": [2.0, 1.5, 1.0, 1.0]}
pathlib.Path(job["out"]).write_text(json.dumps(found))
if "slow" in job["name"]:
    time.sleep(600)
if "broken" in job["name"]:
    sys.exit("RuntimeError: of the row")
if "refused" in job["name"]:
    sys.exit("minitrain.errors.ConfigError: 1 problem\\n  optimizer: expected a name [not-a-choice]")
"""


@pytest.fixture
def bench(monkeypatch):
    """The modules of the benchmark, by name."""
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu
    import gpu_report
    import gpu_rows

    return {"gpu": gpu, "report": gpu_report, "rows": gpu_rows}


@pytest.fixture
def run(bench, monkeypatch, tmp_path):
    """``run(rows)``: the JSON and the markdown of these rows with the worker above, and models that are there."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    for shape in bench["rows"].TINY:
        (tmp_path / "models" / shape / "model").mkdir(parents=True)
        (tmp_path / "models" / shape / "model" / "tokenizer.json").touch()

    def run(rows, *arguments: str):
        given = ["gpu.py", "--device=cpu", f"--results={tmp_path / 'out'}", f"--models={tmp_path / 'models'}"]
        monkeypatch.setattr(sys, "argv", [*given, *arguments])
        assert bench["gpu"].main(rows, worker) == 0
        (written,), (table,) = ((tmp_path / "out").glob(pattern) for pattern in ("*.json", "*.md"))
        return json.loads(written.read_text())["results"], table.read_text()

    return run


def test_what_was_measured_is_kept(bench, run):
    """A row that reaches its limit or fails keeps its steps; the others say why they have none."""
    row = bench["rows"].Row
    rows = [
        row("good", "B", "sft", "1B", warmup=1),
        row("slow", "B", "sft", "1B", warmup=1, limit=1.0),
        row("broken", "B", "sft", "1B", warmup=1),
        row("refused", "B", "sft", "1B"),
        row("peer", "B", "trl", "1B", needs=("no_such_trainer",)),
    ]
    results, table = run(rows)
    status = {result["row"]["name"]: result["status"] for result in results}
    assert status == {"good": "done", "slow": "limit", "broken": "failed", "refused": "skipped", "peer": "skipped"}
    assert [result["rates"].get("tokens_per_second") for result in results] == [200, 200, 200, None, None]
    reasons = {result["row"]["name"]: result["why"] for result in results}
    assert "of the row" in reasons["broken"] and "[not-a-choice]" in reasons["refused"]
    assert "no_such_trainer" in reasons["peer"] and reasons["peer"] in table
    assert "| slow | 200 |" in table and "stopped at its limit" in table


def test_a_phase_ends_when_its_time_is_over(bench, run):
    """The rows that are left are named, not begun."""
    row = bench["rows"].Row
    results, _ = run([row("first", "B", "sft", "1B"), row("other", "C", "sft", "8B")], "--minutes=0.1", "--phases", "B")
    assert [(result["row"]["name"], result["status"]) for result in results] == [("first", "skipped")]
    assert "no time" in results[0]["why"]


def test_an_interrupt_keeps_the_results(bench, tmp_path):
    """SIGTERM while a row runs: those before it are in the files."""
    worker, models = tmp_path / "worker.py", tmp_path / "models"
    worker.write_text(WORKER)
    (models / "1B" / "model").mkdir(parents=True)
    (models / "1B" / "model" / "tokenizer.json").touch()
    code = f"""
import sys, pathlib
sys.path.insert(0, {str(BENCH)!r})
import gpu
from gpu_rows import Row
rows = [Row("first", "B", "sft", "1B", warmup=1), Row("slow", "B", "sft", "1B")]
sys.argv = ["gpu.py", "--device=cpu", "--phases", "B", "--results={tmp_path / "out"}", "--models={models}"]
gpu.main(rows, pathlib.Path({str(worker)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline().startswith("B: first: done")
        time.sleep(0.5)
        process.terminate()
        assert process.wait(DEADLINE) != 0
    finally:
        process.kill()
    (written,) = (tmp_path / "out").glob("*.json")
    assert [one["row"]["name"] for one in json.loads(written.read_text())["results"]] == ["first"]


def test_numbers_of_a_row(bench):
    """MFU by the formula in closed form, LoRA's frozen weights with 4, and the difference from the plain loop."""
    report, row, shape = bench["report"], bench["rows"].Row, bench["rows"].SHAPES["1B"]
    assert shape.n_matmul == pytest.approx(1.236e9, rel=1e-3)
    assert bench["rows"].SHAPES["8B"].n_matmul == pytest.approx(7.505e9, rel=1e-3)
    found = {"tokens": 16_384, "squares": 2e7, "seconds": [5.0, 0.4, 0.3, 0.5], "losses": [2.0, 1.01], "peak_mib": 2048}
    ours = {"row": row("ours", "B", "sft", "1B", warmup=1), "sizes": asdict(shape), "found": found}
    ours |= {"status": "done", "why": "", "watts": [100.0, 600.0, 640.0]}
    plain = {**ours, "row": row("plain", "B", "plain", "1B"), "found": {**found, "losses": [2.0, 1.0]}}
    numbers = report.rates(ours, {"peak": 989e12})
    work = 6 * shape.n_matmul * 16_384 + 6 * 16 * 2048 * 2e7
    assert numbers["mfu"] == pytest.approx(work / 0.4 / 989e12) and numbers["tokens_per_second"] == 16_384 / 0.4
    assert (
        report.difference(ours, [ours, plain]) == pytest.approx(0.01)
        and report.difference(plain, [ours, plain]) is None
    )
    assert report.flops(shape, 1, 0, 4 / 6) == pytest.approx(4 * shape.n_matmul)
    assert report.power(ours) == "620" and numbers["peak_gib"] == 2.0
    assert "mfu" not in report.rates(ours, {"peak": None})


def test_documents_of_a_step_add_up(bench):
    """All steps have the same number of tokens and documents, none longer than the longest."""
    import gpu_work
    import numpy as np

    generator = np.random.Generator(np.random.PCG64(0))
    for tokens in (256, 1024, 4096, 16_384):
        for _ in range(5):
            lengths = gpu_work.draw_lengths(generator, tokens, min(4096, tokens // 2))
            assert lengths.sum() == tokens and lengths.min() >= 4 and lengths.max() <= min(4096, tokens // 2)


@pytest.mark.slow(minutes=6)
def test_all_measurements_run_on_a_cpu(bench, tmp_path):
    """Tiny models: every row of minitrain is done or reaches its limit, and the losses are the plain loop's."""
    command = [sys.executable, str(BENCH / "gpu.py"), "--tiny", "--device=cpu", f"--results={tmp_path}"]
    subprocess.run(command, check=True, timeout=1500)
    (written,) = tmp_path.glob("*.json")
    results = json.loads(written.read_text())["results"]
    assert len(results) == len(bench["rows"].ROWS)
    failed = {one["row"]["name"]: one["why"] for one in results if one["status"] == "failed"}
    assert not failed
    done = {one["row"]["name"]: one for one in results if one["status"] == "done"}
    assert {"minitrain", "minitrain, LoRA", "plain loop, one document at a time"} <= done.keys()
    losses = [done[name]["found"]["losses"] for name in ("minitrain", "plain loop, one document at a time")]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    assert done["resume, bit for bit"]["found"]["same"]
