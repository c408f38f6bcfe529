"""minitrain against a loop written by hand and against TRL: same model, data, order and dtype, in one run.

    python bench/run.py                  all settings, as many rounds as fit in 24 minutes, at most 3
    python bench/run.py --quick          one dtype, few steps, one round (under 3 minutes)
    python bench/run.py --lora 16        adapters: the loop by hand and TRL have PEFT's
    python bench/run.py --peer-python P  a Python that has TRL; without it bench/.venv-peer is made

Each peer runs in a process of its own, in turns. The figures go to bench/results. Exit status 1: the peers did not
do the same work, so nothing can be compared.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from report import report  # noqa: E402
from workload import Setting, build, pick_settings, step_sizes  # noqa: E402

PEERS = ("minitrain", "minitrain packed", "hand", "full_logits", "trl")
FILES = {"minitrain": "peer_minitrain.py", "minitrain packed": "peer_minitrain.py", "trl": "peer_trl.py"}
PEER_PACKAGES = ("torch==2.13.0", "trl==1.16.*", "peft")


def main() -> int:
    arguments = parse_arguments()
    began = time.time()
    settings = pick_settings(arguments.quick, arguments.only, arguments.lora)
    python, why_not = (None, "left out by --peers") if "trl" not in arguments.peers else find_trl(arguments.peer_python)
    skipped = {} if python else {"trl": why_not}
    peers = [peer for peer in arguments.peers if peer not in skipped]
    with tempfile.TemporaryDirectory(prefix="minitrain-bench-") as scratch:
        folders = [Path(scratch) / str(number) for number in range(len(settings))]
        for setting, folder in zip(settings, folders):
            build(setting, folder)
        rounds = 1 if arguments.quick else arguments.rounds
        runs = measure(list(zip(settings, folders)), peers, rounds, began + 60 * arguments.minutes, python)
        results = [
            {"setting": asdict(setting), "sizes": step_sizes(setting, folder), "runs": found}
            for setting, folder, found in zip(settings, folders, runs)
        ]
    return report(results, skipped, arguments.results or HERE / "results", time.time() - began)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one dtype, few steps, one round")
    parser.add_argument("--rounds", type=int, default=3, help="how often each peer runs (default 3)")
    parser.add_argument("--minutes", type=float, default=24, help="begin no round that would end later (default 24)")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train adapters; the peers by PEFT")
    parser.add_argument("--peer-python", help="a Python that has TRL")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS, help="only these")
    parser.add_argument("--only", default="", help="only settings whose name has this in it, e.g. float32")
    parser.add_argument("--results", type=Path, help="folder of the figures (default bench/results)")
    return parser.parse_args()


def find_trl(given: str | None) -> tuple[str | None, str]:
    """(a Python that imports TRL, why there is none); makes bench/.venv-peer when it has to."""
    python = given or str(HERE / ".venv-peer" / "bin" / "python")
    if not given and not Path(python).exists():
        print("making bench/.venv-peer with TRL ...", flush=True)
        try:
            subprocess.run([sys.executable, "-m", "venv", HERE / ".venv-peer"], check=True)
            for package in PEER_PACKAGES:
                subprocess.run([python, "-m", "pip", "install", "--quiet", package], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            return None, f"not installable: {error}"
    try:
        found = subprocess.run([python, "-c", "import trl; trl.SFTTrainer"], capture_output=True, text=True)
    except OSError as error:
        return None, str(error)
    return (python, "") if found.returncode == 0 else (None, "not importable: " + found.stderr.strip()[-300:])


def measure(
    workloads: list[tuple[Setting, Path]], peers: list[str], rounds: int, deadline: float, python: str | None
) -> list[dict[str, list[dict]]]:
    """Runs the peers in turns, each round beginning with another one -> {peer: its results} for each setting.

    The first round is always finished; another one begins only when it will be over before the deadline.
    """
    runs = [{peer: [] for peer in peers} for _ in workloads]
    for number in range(rounds):
        began, first = time.time(), number % len(peers)
        for (setting, folder), found in zip(workloads, runs):
            for peer in [*peers[first:], *peers[:first]]:
                if peer == "full_logits" and number > 0:
                    continue  # it is there for its memory
                found[peer].append(run_peer(setting, folder, peer, python))
                seconds = sum(found[peer][-1]["seconds"][setting.warmup :])
                print(f"round {number + 1}: {setting.name}: {peer}: {seconds / setting.steps:.2f} s a step", flush=True)
            if "minitrain" in peers and number == 0:
                found["breakdown"] = [run_peer(setting, folder, "minitrain", python, breakdown=True)]
        if 2 * time.time() - began > deadline:
            break
    return runs


def run_peer(setting: Setting, folder: Path, peer: str, python: str | None, **more) -> dict:
    """One peer in its own process. Raises RuntimeError with what it said when it fails."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        job = asdict(setting) | more
        job |= {"kind": peer, "n_steps": setting.warmup + setting.steps, "folder": str(folder), "scratch": scratch}
        job["out"] = f"{scratch}/result.json"
        job_file = Path(scratch) / "job.json"
        job_file.write_text(json.dumps(job))
        command = [python if peer == "trl" else sys.executable, HERE / FILES.get(peer, "peer_hand.py"), job_file]
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(HERE.parent)}
        done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{peer} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
        return json.loads(Path(job["out"]).read_text())


if __name__ == "__main__":
    sys.exit(main())
