"""What reaches one rank only: a signal at every failpoint, a hook's wish to stop, another config, other data."""

import json
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.distributed.launch import Ranks, launch, trace
from tests.messages import reports

SOURCES = sorted((ROOT / "minitrain").rglob("*.py"))
FOUND = {point for file in SOURCES for point in re.findall(r'failpoint\("([\w.]+)"', file.read_text())}
POINTS = sorted(point for point in FOUND if not point.startswith("load."))  # where a signal ends the process at once
OF_EACH_RANK = ("step.", "eval.", "train.", "model.", "save.writ", "save.end")  # the others are rank 0's
QUICK = ("step.reduce", "save.write", "model.save")
N_STEPS, N_SIGNALS = 3, 8
OPTIONS = (f"n_steps={N_STEPS}", "eval_every_steps=1", "save_best=true", "keep_checkpoints=1")


@pytest.fixture(scope="session")
def undisturbed(lab) -> list[list]:
    """The trace of the run that no signal reaches."""
    job = lab.job(2, *OPTIONS, "save_every_steps=0")
    launch(2, [job], lab.folder / "undisturbed")
    return trace(Path(job["trace"]))


@pytest.mark.parametrize("save_every", [1, N_STEPS])
@pytest.mark.parametrize(
    "point", [point if point in QUICK else pytest.param(point, marks=pytest.mark.slow) for point in POINTS]
)
def test_signals_to_one_rank(lab, undisturbed, point, save_every):
    """One rank gets SIGTERM the first 8 times that it comes to a point; the command is repeated until the run ends.

    No rank waits for another, each command ends with the same code on both, and nothing is lost or changed.
    """
    job = lab.job(2, *OPTIONS, f"save_every_steps={save_every}", "fsdp.timeout_seconds=60")
    of_each_rank = point.startswith(OF_EACH_RANK)
    rank = int(of_each_rank)
    fault = ",".join(f"{point}@{count}:term#{rank}" for count in range(1, N_SIGNALS + 1))
    jobs, folder = [job] * (N_SIGNALS + 1), lab.folder / "launch" / job["config"]["exp_name"]
    code, output = Ranks(2, jobs, folder, {"MINITRAIN_FAULT": fault}).finish()
    assert code == 0 and "no progress" not in output, output
    codes = [json.loads(text) for text in re.findall(r"exit codes: (\[.*\])", output)]
    assert len(codes) == 2 and codes[0] == codes[1] and codes[0][-1] == 0, output
    assert 143 in codes[0] or not of_each_rank, output
    assert (lab.path(job) / "final" / "config.json").exists()
    assert {line[0]: line for line in trace(Path(job["trace"]))} == {line[0]: line for line in undisturbed}


def test_a_hook_on_one_rank_stops_all(lab):
    """`should_stop` set on one rank, in any step, ends the run on both."""
    jobs = [lab.job(2, *OPTIONS, "fsdp.timeout_seconds=60") | {"stop": [1, step]} for step in range(1, N_STEPS + 1)]
    launch(2, jobs, lab.folder / "hook")
    for step, job in enumerate(jobs, 1):
        assert [line[0] for line in trace(Path(job["trace"]))] == list(range(1, step + 1))
        assert (lab.path(job) / "final" / "config.json").exists()


def test_ranks_with_other_options_or_data(lab, rows_file):
    """An error that names the option before any step, not ranks that wait for one another."""
    rows = rows_file.read_text().splitlines(keepends=True)
    for rank in range(2):
        (lab.folder / f"rows-{rank}.jsonl").write_text("".join(rows[rank:]))
    data = f"datasets=['{lab.folder}/rows-${{oc.env:RANK}}.jsonl']"
    for override, key in (("seed=${oc.decode:${oc.env:RANK}}", "seed"), (data, "datasets")):
        output = launch(2, [lab.job(2, override)], lab.folder / "other", expect=2)
        assert reports(output, "mismatch", f"{key}: the value of rank 1 ")
