"""minitrain against a loop written by hand and against TRL: same model, data, order and dtype, in one run.

    python bench/run.py                  all settings (on 2 CPU cores under 25 minutes)
    python bench/run.py --quick          fewer steps, one round (under 3 minutes)
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
from dataclasses import asdict, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from report import report  # noqa: E402
from workload import Setting, build, pick_settings, step_sizes  # noqa: E402

PEERS = ("minitrain", "minitrain packed", "hand", "full_logits", "trl")
FILES = {"minitrain": "peer_minitrain.py", "minitrain packed": "peer_minitrain.py", "trl": "peer_trl.py"}
PEER_PACKAGES = ("torch==2.13.0", "trl==1.16.*")


def main() -> int:
    arguments = parse_arguments()
    began = time.time()
    python, why_not = (None, "left out by --peers") if "trl" not in arguments.peers else find_trl(arguments.peer_python)
    skipped = {} if python else {"trl": why_not}
    peers = [peer for peer in arguments.peers if peer not in skipped]
    settings = pick_settings(arguments.quick, arguments.only)
    results = []
    with tempfile.TemporaryDirectory(prefix="minitrain-bench-") as scratch:
        for number, setting in enumerate(settings):
            folder = Path(scratch) / str(number)
            build(setting, folder)
            runs = measure(setting, folder, peers, 1 if arguments.quick else arguments.rounds, python)
            results.append({"setting": asdict(setting), "sizes": step_sizes(setting, folder), "runs": runs})
    return report(results, skipped, arguments.results or HERE / "results", time.time() - began)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps, one round")
    parser.add_argument("--rounds", type=int, default=3, help="how often each peer runs (default 3)")
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


def measure(setting: Setting, folder: Path, peers: list[str], rounds: int, python: str | None) -> dict[str, list[dict]]:
    """Runs the peers in turns, each round beginning with another one -> {peer: its results}."""
    runs = {peer: [] for peer in peers}
    for number in range(rounds):
        first = number % len(peers)
        for peer in [*peers[first:], *peers[:first]]:
            if peer == "full_logits" and number > 0:
                continue  # it is there for its memory
            runs[peer].append(run_peer(setting, folder, peer, python))
            seconds = sum(runs[peer][-1]["seconds"][setting.warmup :])
            print(f"{setting.name}: round {number + 1}: {peer}: {seconds:.2f} s for {setting.steps} steps", flush=True)
    if "minitrain" in peers:
        short = replace(setting, steps=min(setting.steps, 6))
        runs["breakdown"] = [run_peer(short, folder, "minitrain", python, breakdown=True)]
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
