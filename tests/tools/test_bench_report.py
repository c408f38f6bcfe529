"""bench/report.py: the tables of bench/run.py, from figures whose ratios are known."""

import importlib
import json

import pytest

from tests.conftest import ROOT

SIZES = [{"tokens": 100, "supervised": 40, "squares": 2_000}] * 3


@pytest.fixture
def bench(monkeypatch):
    """The modules of the benchmark, by name."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import report
    import workload

    return {"report": report, "workload": workload}


def a_run(seconds: float, peak: float, loss: float = 2.0, places: int = 100) -> dict:
    """What a peer finds in a warm-up step and two timed ones."""
    return {
        "seconds": [9.0, seconds, seconds],
        "cpu_seconds": [9.0, seconds, seconds],
        "places": [places] * 3,
        "losses": [loss] * 3,
        "supervised": [40] * 3,
        "peak_mib": peak,
        "rates": {"body": 1e9, "head": 1e9},
        "torch": "2",
    }


def written(bench: dict, tmp_path, losses: float, **setting) -> tuple[int, str, dict]:
    """The exit status, the markdown and the JSON of a large setting, in which `minitrain` has these losses."""
    setting = bench["workload"].Setting(128_256, "float32", steps=2, batch=8, warmup=1, **setting)
    runs = {
        "minitrain": [a_run(0.5, 100, losses), a_run(0.5, 100, losses)],
        "minitrain packed": [a_run(0.25, 50)],
        "hand": [a_run(1.0, 100)],
        "full_logits": [a_run(1.0, 150)],
        "trl": [a_run(2.0, 400)],
    }
    result = {"setting": setting.__dict__, "sizes": SIZES, "runs": runs}
    status = bench["report"].report([result], {"other": "not there"}, tmp_path, 60.0)
    (table,), (figures,) = tmp_path.glob("*.md"), tmp_path.glob("*.json")
    return status, table.read_text(), json.loads(figures.read_text())["settings"][0]


@pytest.mark.parametrize("lora", [0, 16])
def test_the_tables_have_the_ratios_of_the_figures(bench, tmp_path, lora):
    status, table, found = written(bench, tmp_path, losses=2.0, lora=lora)
    assert status == 0 and found["peers"]["minitrain"]["tokens_per_second"] == 200
    for line in (
        "| minitrain | 200 | 200 - 200 | 2.00 | 4.00 | 2.00 | 100 |",
        "minitrain against hand: faster (2.00)",
        "minitrain packed against minitrain: faster (2.00)",
        "half of the memory of full_logits: NO (0.67)",
        "half of the memory of trl: yes (0.25)",
        "same work in all",
        "other: skipped (not there); nothing is claimed against it",
    ):
        assert line in table, line


def test_other_work_is_named(bench, tmp_path):
    """Losses that differ mean that nothing can be compared."""
    status, table, _ = written(bench, tmp_path, losses=2.1)
    assert status == 1 and "NOT THE SAME WORK: minitrain\n" in table


@pytest.mark.parametrize("command", ["gpu", "memory", "rl", "run"])
def test_a_pattern_that_nothing_has_is_refused(bench, monkeypatch, command):
    """Before anything is built or installed."""
    monkeypatch.setattr("sys.argv", [f"{command}.py", "--only", "quadratic"])
    with pytest.raises(SystemExit, match="--only quadratic: expected a p"):
        importlib.import_module(command).main()
