"""The files of example/cluster: preempted by a double of Slurm, run on two machines that are one, and parsed."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from minitrain.cli.main import main
from tests.conftest import ROOT
from tests.distributed.launch import FORKS
from tests.faults.slurm import Scheduler

CLUSTER = ROOT / "example" / "cluster"
SCRIPTS = sorted(path.name for path in CLUSTER.glob("*.s*") if path.suffix in (".sbatch", ".sh"))
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
TIMEOUT = 300


@pytest.fixture
def scheduler(tmp_path):
    return Scheduler(tmp_path / "slurm", FORKS)


@pytest.fixture
def config(tmp_path, llama_folder, rows_file) -> Path:
    """A config that writes a checkpoint only when it is stopped."""
    options = {
        "datasets": [str(rows_file)],
        "model": {"name_or_path": str(llama_folder)},
        "output_dir": str(tmp_path / "runs"),
        "cache_dir": str(tmp_path / "cache"),
        "total_batch_size": 4,
        "lr": 1e-2,
        "save_every_steps": 0,
        "keep_checkpoints": 1,
        "num_proc": 1,
        "log_every_steps": 500,
    }
    file = tmp_path / "config.yml"
    file.write_text(json.dumps(options))
    return file


def ledger(config: Path, name: str) -> Path:
    return config.parent / "runs" / name / "ledger.jsonl"


@pytest.mark.parametrize(
    "n_preemptions, n_steps, n_ranks", [(3, 120, 2), pytest.param(100, 1000, 1, marks=pytest.mark.slow(minutes=20))]
)
def test_preempted_by_slurm(scheduler, config, n_preemptions, n_steps, n_ranks):
    """SIGUSR1 before the time limit and SIGTERM in turn: a checkpoint each time, and the ledger of a run in peace."""
    overrides = ["--overrides", f"n_steps={n_steps}", *(["trainer=FSDPTrainer"] if n_ranks > 1 else [])]
    options = ["--nodes=1", f"--ntasks-per-node={n_ranks}", str(CLUSTER / "slurm.sbatch"), str(config), *overrides]
    preemptions = list(itertools.islice(itertools.cycle(SIGNALS), n_preemptions))
    peace = ledger(config, "peace")
    assert scheduler.sbatch(*options, "exp_name=peace", ledger=peace, preemptions=[]) == 0, scheduler.output.read_text()
    scheduler.codes.clear()
    disturbed = ledger(config, "config")
    assert scheduler.sbatch(*options, ledger=disturbed, preemptions=preemptions) == 0, scheduler.output.read_text()
    assert scheduler.codes == [128 + number for number in preemptions] + [0]
    output = scheduler.output.read_text()
    for number in SIGNALS:
        assert output.count(f"stopped by {number.name} at step") == preemptions.count(number)
    assert output.count("resuming from") == n_preemptions and "Traceback" not in output
    assert disturbed.read_text() == peace.read_text() and disturbed.read_text().count("\n") == n_steps


def test_an_array_of_seeds(scheduler, config):
    """Each task of the array has a run of its own; one that is stopped in time is requeued and ends."""
    script, more = str(CLUSTER / "slurm-seeds.sbatch"), ["--overrides", "n_steps=80"]
    for seed in (0, 1):
        file = ledger(config, f"config-{seed}")
        arguments = {"ledger": file, "preemptions": [signal.SIGUSR1] * seed, "array_task": seed}
        assert scheduler.sbatch(script, str(config), *more, **arguments) == 0, scheduler.output.read_text()
        assert file.read_text().count("\n") == 80
    assert scheduler.codes == [0, 138, 0]
    saved = [yaml.safe_load((ledger(config, f"config-{seed}").parent / "config.yml").read_text()) for seed in (0, 1)]
    assert [one["seed"] for one in saved] == [0, 1]


def test_a_job_that_fails_is_not_requeued(scheduler, config, tmp_path):
    """Neither is one that a user ends by scancel, which is SIGTERM without a requeue by Slurm."""
    options = ("--nodes=1", "--ntasks-per-node=1", str(CLUSTER / "slurm.sbatch"), str(config))
    code = scheduler.sbatch(*options, "--overrides", "lr=x", ledger=tmp_path / "none", preemptions=[])
    assert (code, scheduler.codes) == (2, [2])


@pytest.mark.slow(minutes=2)
def test_two_machines_with_torchrun(config):
    """Two launchers, as on two machines; the run has the steps of one rank."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = str(opened.getsockname()[1])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {"PATH": path, "PYTHONPATH": str(ROOT), "GPUS": "1", "PORT": port, "OMP_NUM_THREADS": "1"}
    overrides = ["--overrides", "trainer=FSDPTrainer", "n_steps=3", "fsdp.timeout_seconds=60"]
    machines = [
        subprocess.Popen(
            ["bash", str(CLUSTER / "torchrun.sh"), "127.0.0.1", "2", str(machine), str(config), *overrides],
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for machine in (0, 1)
    ]
    try:
        outputs = [machine.communicate(timeout=TIMEOUT)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert ledger(config, "config").read_text().count("\n") == 3 and "trained on 2 x cpu" in outputs[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_bash(name):
    assert subprocess.run(["bash", "-n", str(CLUSTER / name)], capture_output=True).returncode == 0


def test_yaml_files_start_a_training():
    """They parse, and the commands in them name the arguments of torchrun and of `minitrain train`."""
    jobset = yaml.safe_load((CLUSTER / "jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]
    pod = job["template"]["spec"]["template"]["spec"]
    command = pod["containers"][0]["command"][-1]
    address = f"{jobset['metadata']['name']}-{job['name']}-0-0.{jobset['metadata']['name']}"
    assert f"--master-addr={address}" in command and f"--nnodes={job['template']['spec']['parallelism']}" in command
    patience = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
    assert int(patience["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert command.startswith("exec ") and "\n" not in command.strip()
    sky = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    for text in (command, sky["run"], (CLUSTER / "torchrun.sh").read_text()):
        assert "-m minitrain train" in text and all(
            f"--{name}" in text for name in ("nnodes", "node-rank", "master-addr")
        )


def test_what_a_time_limit_of_torchrun_needs(capsys):
    """The exit codes that the scripts of Slurm requeue are those that the help of the command names."""
    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "138 by SIGUSR1" in text and "142 by max_minutes" in text
    for name in ("slurm.sbatch", "slurm-seeds.sbatch"):
        assert "$code = 138 ] || [ $code = 142" in (CLUSTER / name).read_text()
