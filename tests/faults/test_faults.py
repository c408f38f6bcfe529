"""What a run survives: killed, stopped, starved, confused; each time it goes on as if nothing had been.

The oracle is the trace of an uninterrupted run: step, examples, bits of the loss, hash of the weights.
"""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.distributed.launch import finish, launch, start, trace

pytestmark = pytest.mark.slow  # `make faults`
N_STEPS = 12
EVERYTHING = pytest.mark.slow  # in `make faults` and `make test-all`
OPTIONS = (
    f"n_steps={N_STEPS}",
    "total_batch_size=6",  # an epoch of 35 ends with a short step
    "save_every_steps=2",
    "gradient_accumulation_steps=1",
    "validation_split=5",
    "eval_every_steps=5",
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, llama_folder, rows_file):
    """Makes jobs and keeps the oracle of each number of ranks."""
    return Lab(tmp_path_factory.mktemp("lab"), llama_folder, rows_file)


class Lab:
    def __init__(self, folder: Path, model: Path, rows: Path):
        self.folder, self.model, self.rows, self.count, self.oracles = folder, model, rows, 0, {}

    def job(self, ranks: int, *overrides: str, dropout: float = 0.1) -> dict:
        self.count += 1
        name = f"run-{self.count}"
        config = {
            "datasets": [str(self.rows)],
            "model": {"name_or_path": str(self.model)},
            "output_dir": str(self.folder / "runs"),
            "cache_dir": str(self.folder / "cache"),
            "exp_name": name,
            "lr": 1e-2,
            "log_every_steps": 1,
            "num_proc": 1,
        }
        if ranks:
            config["trainer"] = "FSDPTrainer"
        trace_file = str(self.folder / f"{name}.trace")
        return {"config": config, "overrides": [*OPTIONS, *overrides], "trace": trace_file, "dropout": dropout}

    def oracle(self, ranks: int) -> dict[int, list]:
        if ranks not in self.oracles:
            job = self.job(ranks)
            launch(ranks, [job], self.folder / "oracle")
            self.oracles[ranks] = {line[0]: line for line in trace(Path(job["trace"]))}
            assert list(self.oracles[ranks]) == list(range(1, N_STEPS + 1))
        return self.oracles[ranks]

    def run(self, ranks: int, job: dict, fault: str = "", **options) -> tuple[int, str]:
        env = {"MINITRAIN_FAULT": fault} if fault else {}
        return finish(start(ranks, [job], self.folder / job["config"]["exp_name"], env, **options))

    def recover(self, ranks: int, job: dict) -> str:
        """The same command again ends the run; all that was ever traced is as in the oracle, and nothing is missing."""
        code, output = self.run(ranks, job)
        assert code == 0, output[-3000:]
        oracle, found = self.oracle(ranks), trace(Path(job["trace"]))
        for line in found:
            assert line == oracle[line[0]], output[-3000:]
        assert {line[0] for line in found} == set(oracle) and found[-1][0] == N_STEPS
        run = Path(job["config"]["output_dir"]) / job["config"]["exp_name"]
        assert not [*run.rglob(".tmp-*"), *run.rglob(".trash-*")]
        return output


SAVE_POINTS = ("save.write@3", "save.written@2", "save.written@6", "save.manifest@2", "save.rename@2", "save.renamed@2")
PRUNE_POINTS = ("prune.before@1", "prune.renamed@1")
STEP_POINTS = ("step.batch@5", "step.backward@7", "step.reduce@9", "eval.batch@2")


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=EVERYTHING)])
@pytest.mark.parametrize(
    "point",
    ["save.manifest@2", *(pytest.param(p, marks=EVERYTHING) for p in (*SAVE_POINTS, *PRUNE_POINTS, *STEP_POINTS))],
)
def test_killed_at_a_point(lab, ranks, point):
    """F1, F2: kill -9 in the middle of a save, of the removal of an old checkpoint, or of a step."""
    job = lab.job(ranks)
    code, output = lab.run(
        ranks, job, f"{point}:kill9" + ("#1" if ranks and not point.startswith(("save.m", "save.r", "prune")) else "")
    )
    assert code not in (0, 1) or (ranks and code == 1), output
    lab.recover(ranks, job)


@EVERYTHING
@pytest.mark.parametrize("seed", range(30))
def test_killed_at_a_random_moment(lab, seed):
    """F1: kill -9 at a random moment, on one process or on one of two ranks."""
    rng = random.Random(seed)
    ranks = 2 if seed % 3 == 0 else 0
    job = lab.job(ranks)
    process = start(ranks, [job], lab.folder / job["config"]["exp_name"])
    file = Path(job["trace"])
    began = time.monotonic()
    while not file.exists() and time.monotonic() - began < 60:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 1.0 if ranks == 0 else 2.5))
    victims = workers(process.pid) if ranks else [process.pid]
    if victims:
        os.kill(rng.choice(victims), signal.SIGKILL)
    finish(process)
    lab.recover(ranks, job)


def workers(launcher: int) -> list[int]:
    """The processes that torchrun started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == launcher:
            found.append(int(folder.name))
    return found


@pytest.mark.parametrize(
    "point",
    ["step.backward@7", *(pytest.param(p, marks=EVERYTHING) for p in ("step.batch@5", "eval.batch@1", "save.write@2"))],
)
@pytest.mark.parametrize("ranks", [2, pytest.param(0, marks=EVERYTHING)])
def test_signal_to_one_rank(lab, ranks, point):
    """F3: one SIGTERM to one rank: all stop after the same step with one checkpoint, and go on from there."""
    job = lab.job(ranks, "save_every_steps=0" if point.startswith("step") else "save_every_steps=4")
    code, output = lab.run(ranks, job, f"{point}:term" + ("#1" if ranks else ""))
    assert code == (1 if ranks else 143), output
    assert (
        "stopped by SIGTERM at step" in output
        and "Traceback (most recent call last)" not in output.split("torch.distributed.elastic")[0]
    )
    lab.recover(ranks, job)


@EVERYTHING
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_launcher(lab, number):
    """F3: torchrun passes the signal on; a second one does no harm."""
    job = lab.job(2)
    process = start(2, [job], lab.folder / job["config"]["exp_name"])
    while not Path(job["trace"]).exists():
        time.sleep(0.05)
    os.kill(process.pid, number)
    time.sleep(0.2)
    for worker in workers(process.pid):
        os.kill(worker, number)
    code, output = finish(process)
    assert code != 0
    assert f"stopped by {number.name} at step" in output, output
    lab.recover(2, job)


@pytest.mark.parametrize("ranks", [2, pytest.param(0, marks=EVERYTHING)])
def test_disk_full_on_one_rank(lab, ranks):
    """F5: all ranks raise the same error, nothing is left of the half checkpoint, and the old one serves."""
    job = lab.job(ranks)
    code, output = lab.run(ranks, job, "save.write@4:enospc" + ("#1" if ranks else ""))
    assert code == 1 and "step-4: cannot be written: rank" in output and "No space left" in output, output
    folder = Path(job["config"]["output_dir"]) / job["config"]["exp_name"] / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-2"]
    lab.recover(ranks, job)


def test_nan_on_one_rank(lab):
    """F9: no weight, moment or schedule changes, all ranks agree, it is logged; then the run goes on."""
    job = lab.job(2)
    code, output = lab.run(2, job, "step.loss@3:nan#1")
    assert code == 0 and "step 3: loss or gradient is not finite; the step is skipped" in output, output
    lines = trace(Path(job["trace"]))
    assert lines[2][3] == lines[1][3] and lines[2][2] == "nan" and lines[3][3] != lines[2][3]
    assert len(lines) == N_STEPS and all(line[2] != "nan" for line in lines[3:])


@pytest.mark.parametrize(
    "point", ["step.backward@3", *(pytest.param(p, marks=EVERYTHING) for p in ("step.reduce@3", "save.write@2"))]
)
def test_one_rank_dies(lab, point):
    """F11: the job ends in less than 30 s without orphans; with --max-restarts it goes on by itself."""
    job = lab.job(2)
    began = time.monotonic()
    process = start(2, [job], lab.folder / "dies", {"MINITRAIN_FAULT": f"{point}:kill9#1"})
    pids: list[int] = []
    while process.poll() is None and time.monotonic() - began < 90:
        pids = workers(process.pid) or pids
        time.sleep(0.1)
    code, output = finish(process)
    assert code != 0 and pids and not any(Path(f"/proc/{pid}").exists() for pid in pids), output
    assert "lost contact with another process" in output
    again = lab.job(2)
    code, output = lab.run(2, again, f"{point}:kill9#1", max_restarts=1)
    assert code == 0, output[-3000:]
    lab.recover(2, again)


def test_one_rank_hangs(lab):
    """F12: after the timeout, the rank, the step and the stack are printed, and the job ends."""
    job = lab.job(2, "fsdp.timeout_seconds=4")
    code, output = lab.run(2, job, "step.batch@5:sleep#1")
    assert code == 1, output
    assert "rank 1: nothing has moved for 4 s, at step 5; the others wait for this rank, which is here:" in output
    assert "_train_step" in output and "rank 0: nothing has moved for 4 s, at step 5; it waits for rank 1" in output


@pytest.mark.parametrize("before, after", [(2, 0), pytest.param(0, 2, marks=EVERYTHING)])
def test_another_number_of_ranks(lab, before, after):
    """F13: the same examples in the same order, weights at load exactly equal, later losses within 1e-5."""
    job = lab.job(before, dropout=0.0)
    code, output = lab.run(before, job, "step.batch@8:term" + ("#0" if before else ""))
    assert code == (1 if before else 143), output
    stopped = trace(Path(job["trace"]))[-1]
    job["config"]["trainer"] = "FSDPTrainer" if after else "BasicTrainer"
    loaded = {**job, "overrides": [*job["overrides"], f"n_steps={stopped[0]}"], "weights": job["trace"] + ".loaded"}
    code, output = lab.run(after, job)
    assert code == 0, output[-3000:]
    alone = lab.job(0, dropout=0.0)
    launch(0, [alone], lab.folder / "alone")
    for ours, theirs in zip(trace(Path(job["trace"])), trace(Path(alone["trace"])), strict=True):
        assert ours[:2] == theirs[:2]
        assert float.fromhex(ours[2]) == pytest.approx(float.fromhex(theirs[2]), rel=1e-5)
    assert loaded


def test_two_jobs_in_one_folder(lab):
    """F17: the second one refuses and says who is there; a lock left behind by a killed one is no hindrance."""
    job = lab.job(0)
    first = start(0, [job], lab.folder / "first", {"MINITRAIN_FAULT": "step.batch@3:sleep"})
    while not Path(job["trace"]).exists():
        time.sleep(0.05)
    code, output = lab.run(0, {**job, "trace": job["trace"] + ".second"})
    assert code == 2 and f"another process trains in this folder (process {first.pid} on" in output, output
    os.kill(first.pid, signal.SIGKILL)
    finish(first)
    lab.recover(0, job)


def test_asynchronous_save(lab):
    """Checkpoints written in a thread are the same; one that fails ends the run with its error."""
    for ranks in (0, 2):
        job = lab.job(ranks, "save_async=true")
        code, output = lab.run(ranks, job, "step.batch@9:kill9")
        lab.recover(ranks, job)
    job = lab.job(0, "save_async=true")
    code, output = lab.run(0, job, "save.write@4:enospc")
    assert code == 1 and "No space left" in output, output
    lab.recover(0, job)


def test_oracles_are_what_they_seem(lab):
    """Every example of an epoch once, over both ranks, in the order of one process."""
    alone, ranks = lab.oracle(0), lab.oracle(2)
    assert [line[1] for line in alone.values()] == [line[1] for line in ranks.values()]
    seen = [index for line in alone.values() for index in line[1]]
    assert sorted(seen[:35]) == list(range(35)) and sorted(seen[35:]) == list(range(35))
