"""What a run survives: killed, stopped, starved, confused; each time it goes on as if nothing had been.

Those marked EVERYTHING are in `make faults` and `make test-all`, the others are a sample of them in `make test`.
"""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.distributed.launch import DRIVER, children, finish, launch, torchrun, trace
from tests.faults.lab import N_STEPS
from tests.messages import reports

EVERYTHING = pytest.mark.slow
TRACEBACK = "Traceback (most recent call last)"


def sample(*values, rest=()):
    """Values of a parameter: the first ones always, the rest in the whole battery only."""
    return [*values, *(pytest.param(value, marks=EVERYTHING) for value in rest)]


OF_RANK_0 = ("save.manifest@2", "save.rename@2", "save.renamed@2", "prune.before@1", "prune.renamed@1", "replace.new@2")
OF_EACH_RANK = ("save.write@3", "save.written@2", "save.written@6", "step.batch@5", "step.backward@7", "step.reduce@9")


@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.parametrize(
    "point", sample("save.written@4", "save.rename@3", "step.batch@8", rest=(*OF_RANK_0, *OF_EACH_RANK, "eval.batch@2"))
)
def test_killed_at_a_point(lab, ranks, point):
    """F1, F2: kill -9 in the middle of a save, of the removal of an old checkpoint, or of a step."""
    job = lab.job(ranks)
    of_one = ranks and not point.startswith(("save.m", "save.r", "prune", "replace"))
    code, output = lab.run(ranks, job, f"{point}:kill9" + ("#1" if of_one else ""))
    assert code == -signal.SIGKILL, output
    lab.recover(ranks, job)


@pytest.mark.parametrize("seed", sample(0, 1, rest=range(2, 30)))
def test_killed_at_a_random_moment(lab, seed):
    """F1: kill -9 at a random moment, on one process or on one of two ranks."""
    rng = random.Random(seed)
    ranks = 2 if seed % 2 else 0
    job = lab.job(ranks)
    started = lab.start(ranks, job)
    while not Path(job["trace"]).exists():
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.8))
    started.kill(signal.SIGKILL, rng.randrange(max(1, ranks)))
    started.finish()
    lab.recover(ranks, job)


@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.parametrize("point", sample("step.backward@7", "save.write@2", rest=("step.batch@5", "eval.batch@2")))
def test_signal_to_one_rank(lab, ranks, point):
    """F3: one SIGTERM to one rank: all stop after the same step with one checkpoint, and go on from there."""
    job = lab.job(ranks, "save_every_steps=0" if point.startswith("step") else "save_every_steps=4")
    code, output = lab.run(ranks, job, f"{point}:term" + ("#1" if ranks else ""))
    assert code == 143 and output.count("stopped by SIGTERM at step") == 1 and TRACEBACK not in output, output
    steps = {line[0] for line in trace(Path(job["trace"]))}
    assert lab.checkpoints(job)[-1] == f"step-{max(steps)}"
    lab.recover(ranks, job)


@pytest.mark.parametrize("micro_step", sample(5, rest=range(1, 3 * N_STEPS + 1)))
def test_signal_in_each_micro_step(lab, micro_step):
    """F14: in an accumulation window too, and at the borders of epochs, which lie within 12 steps of 6 from 35."""
    job = lab.job(0, "gradient_accumulation_steps=3")
    code, output = lab.run(0, job, f"step.backward@{micro_step}:term")
    assert code == 143, output
    lab.recover(0, job, "gradient_accumulation_steps=3")


@EVERYTHING
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_all_twice(lab, number):
    """F3: as a launcher passes it on; the second one does no harm."""
    job = lab.job(2)
    started = lab.start(2, job)
    while not Path(job["trace"]).exists():
        time.sleep(0.01)
    for _ in range(2):
        started.kill(number, 0)
        started.kill(number, 1)
        time.sleep(0.05)
    code, output = started.finish()
    assert code == 128 + number and f"stopped by {number.name} at step" in output and TRACEBACK not in output, output
    lab.recover(2, job)


@pytest.mark.parametrize("ranks", [0, 2])
def test_disk_full_on_one_rank(lab, ranks):
    """F5: all ranks raise the same error, nothing is left of the half checkpoint, and the old one serves."""
    job = lab.job(ranks)
    code, output = lab.start(ranks, job, "save.write@4:enospc" + ("#1" if ranks else "")).finish(patience=60)
    told = f"rank {1 if ranks else 0}: {os.strerror(errno.ENOSPC)} [no-space]"
    assert code == 1 and output.count(told) == max(1, ranks) and TRACEBACK not in output, output
    assert output.count("step-4: ") == max(1, ranks), output
    assert lab.checkpoints(job) == ["step-2"]
    lab.recover(ranks, job)


@pytest.mark.parametrize("ranks", [0, 2])
def test_loss_that_is_nan(lab, ranks):
    """F9: no weight, moment or schedule changes, all ranks agree, it is logged; then the run goes on."""
    job = lab.job(ranks)
    code, output = lab.run(ranks, job, "step.loss@3:nan" + ("#1" if ranks else ""))
    assert code == 0 and output.count("step 3: loss or gradient is not finite") == 1, output
    lines = trace(Path(job["trace"]))
    assert lines[2][3] == lines[1][3] and lines[2][2] == "nan" and lines[3][3] != lines[2][3]
    assert len(lines) == N_STEPS and all(line[2] != "nan" for line in lines[3:])


@EVERYTHING
@pytest.mark.parametrize("point", ["step.backward@3", "step.reduce@3", "save.write@2"])
def test_a_rank_dies_under_torchrun(lab, point):
    """F11: the job ends in less than 30 s without orphans; with --max-restarts it goes on by itself."""
    job, fault = lab.job(2), {"MINITRAIN_FAULT": f"{point}:kill9#1"}
    process = torchrun(2, [job], lab.folder / "dies", fault)
    pids: list[int] = []
    died = None
    while process.poll() is None:
        alive = children(process.pid)
        pids = max(pids, alive, key=len)
        if died is None and len(alive) < len(pids):
            died = time.monotonic()
        time.sleep(0.05)
    seconds = time.monotonic() - (died or time.monotonic())
    code, output = finish(process)
    assert code != 0 and seconds < 30 and len(pids) == 2, output
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids), output
    assert "lost contact with another process" in output or "stopped by" in output
    again = lab.job(2)
    code, output = finish(torchrun(2, [again], lab.folder / "again", fault, max_restarts=1))
    assert code == 0, output[-3000:]
    lab.compare(2, again)


def test_one_rank_hangs(lab):
    """F12: after the timeout, the rank, the step and the stack are printed, and the job ends."""
    job = lab.job(2, "fsdp.timeout_seconds=4")
    code, output = lab.run(2, job, "step.batch@5:sleep#1")
    assert code == 1, output
    assert "rank 1: no progress for 4 s in step 5; the others wait for this rank. Its stack:" in output
    assert "forward_backward" in output and "rank 0: no progress for 4 s in step 5; it waits for rank 1" in output


@pytest.mark.parametrize("shard", ["full", *sample(rest=("grad", "none"))])
@pytest.mark.parametrize("before, after", [(2, 0), (0, 2), pytest.param(2, 3, marks=EVERYTHING)])
def test_another_number_of_ranks(lab, before, after, shard):
    """F13: weights and moments at load exactly equal, no example lost or repeated, later losses within 1e-5."""
    cut = "gradient_accumulation_steps=1"
    job = lab.job(before, f"fsdp.shard={shard}" if before else cut, dropout=0.0)
    code, output = lab.run(before, job, "step.batch@8:term" + ("#0" if before else ""))
    assert code == 143, output
    job["config"]["trainer"] = "FSDPTrainer" if after else "BasicTrainer"
    job["overrides"][-1] = f"fsdp.shard={shard}" if after else cut
    ended = load_file(job["ended"])
    code, output = lab.run(after, job)
    assert code == 0, output[-3000:]
    began = load_file(job["began"])
    assert began.keys() == ended.keys() and any("exp_avg_sq" in name for name in began)
    assert all(began[name].equal(ended[name]) for name in began)
    alone = lab.job(0, dropout=0.0)
    launch(0, [alone], lab.folder / "alone")
    for ours, theirs in zip(trace(Path(job["trace"])), trace(Path(alone["trace"])), strict=True):
        assert ours[:2] == theirs[:2]
        assert float.fromhex(ours[2]) == pytest.approx(float.fromhex(theirs[2]), rel=1e-5)


def test_two_jobs_in_one_folder(lab):
    """F17: the second one refuses and says who is there; a lock left behind by a killed one is no hindrance."""
    job = lab.job(0)
    first = lab.start(0, job, "step.batch@3:sleep")
    while not Path(job["trace"]).exists():
        time.sleep(0.01)
    code, output = lab.run(0, {**job, "trace": job["trace"] + ".second"})
    assert code == 2 and reports(output, "locked", f"process {first.pids[0]} "), output
    first.kill(signal.SIGKILL)
    first.finish()
    lab.recover(0, job)


@pytest.mark.parametrize("ranks", [0, 2])
def test_asynchronous_save(lab, ranks):
    """Checkpoints written while steps are taken hold what was there before; one that fails ends the run."""
    job = lab.job(ranks, "save_async=true")
    code, output = lab.run(ranks, job, "save.write@7:pause,save.write@10:kill9")
    assert code == -signal.SIGKILL and "step-6" in lab.checkpoints(job), output
    lab.recover(ranks, job)
    job = lab.job(ranks, "save_async=true")
    code, output = lab.run(ranks, job, "save.write@4:enospc")
    assert code == 1 and reports(output, "no-space", "step-4: ") and TRACEBACK not in output, output
    lab.recover(ranks, job)


def test_a_byte_flipped_while_it_is_written(lab):
    """F7: what was hashed is not what is on the disk: the newest checkpoint is named and the one before taken."""
    job = lab.job(0)
    code, output = lab.run(0, job, "save.written@6:flip,step.batch@9:kill9")  # rng of step 4
    assert code == -signal.SIGKILL, output
    damaged = lab.path(job) / "checkpoints" / "step-8"
    (damaged / "model-0.safetensors").write_bytes(b"")
    output = lab.recover(0, job)
    assert f"{damaged / 'model-0.safetensors'}: " in output and str(damaged.with_name("step-6")) in output


def test_oracles_are_what_they_seem(lab):
    """Every example of an epoch once, over both ranks, in the order of one process."""
    alone, ranks = lab.oracle(0), lab.oracle(2)
    assert [line[1] for line in alone.values()] == [line[1] for line in ranks.values()]
    seen = [index for line in alone.values() for index in line[1]]
    assert sorted(seen[:35]) == list(range(35)) and sorted(seen[35:]) == list(range(35))


@EVERYTHING
def test_a_folder_that_goes_away(lab):
    """F6: the run directory is removed while training: it is made anew or the error is one line; nothing hangs."""
    job = lab.job(0)
    started = lab.start(0, job, "step.batch@5:term")
    while not Path(job["trace"]).exists():
        time.sleep(0.005)
    lab.path(job).rename(lab.path(job).with_name("gone"))
    code, output = started.finish()
    assert code in (1, 143) and TRACEBACK not in output, output


def test_a_folder_that_cannot_be_made(lab):
    """F6: told before the first step."""
    job = lab.job(0, "output_dir=/proc/1/nothing")
    code, output = lab.run(0, job)
    assert code == 2 and reports(output, "not-writable", "/proc/1/nothing") and TRACEBACK not in output, output
    assert "step 1/" not in output


IN_A_NAMESPACE = ["unshare", "-rm", "sh", "-c"]
NO_NAMESPACES = subprocess.run([*IN_A_NAMESPACE, "mount -t tmpfs tmpfs /mnt"], capture_output=True).returncode != 0


@pytest.mark.skipif(NO_NAMESPACES, reason="this machine allows no user namespaces with mounts of their own")
@pytest.mark.parametrize(
    "size, overrides, told",
    [
        ("1m", (), "checkpoints/step-6: a checkpoint needs "),
        ("48k", ("save_every_steps=0",), "final: cannot be written: "),
    ],
)
def test_a_disk_that_is_really_full(lab, size, overrides, told):
    """F5 on a small tmpfs: one line that says so, nothing half written, and with more room the run goes on."""
    job = lab.job(0, *overrides)
    runs, jobs = Path(job["config"]["output_dir"]), lab.folder / "full.json"
    runs.mkdir(exist_ok=True)
    jobs.write_text(json.dumps([job]))
    command = f"{sys.executable} {DRIVER} {jobs} 2>&1; echo exit code $?"
    script = f"mount -t tmpfs -o size={size} tmpfs {runs}; {command}; find {runs}; mount -o remount,size=64m {runs}; "
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*IN_A_NAMESPACE, script + command], env=env, capture_output=True, text=True)
    first, _, second = done.stdout.partition("exit code 1")
    assert told in first and TRACEBACK not in first and ".tmp-" not in second, done
    assert second.endswith("exit code 0\n"), done
    lab.compare(0, job)
