"""minitrain on one GPU, against other trainers: whether everything runs, and how fast. About 25 minutes.

    python bench/gpu.py                         all phases: A checks (7 minutes), B 1B (9), C 8B (9)
    python bench/gpu.py --phases B --minutes 5  one phase in another time
    python bench/gpu.py --tiny --device cpu     the same with tiny models, to try out the script itself

Nothing is downloaded: models are random, with real shapes, and saved where it runs. Each measurement has a process and
a limit of its own; the rows of a phase run in order, most important first, until its time is over. The results are
rewritten after every one, so that what was measured is kept whatever ends the script. A trainer that is not installed
is skipped, and named; so is an option that this version of minitrain does not have.
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import gpu_report  # noqa: E402
from gpu_rows import MINUTES, ROWS, SHAPES, TINY, Row  # noqa: E402

PEERS = ("trl", "unsloth", "torchtune")  # the work of other trainers
SHORTEST = 15  # seconds: with less left in its phase, a row is not begun
CODES = r"unknown-option|not-a-choice|not-installed|unsupported-\w+|invalid-value|wrong-type"
REFUSED = re.compile(rf"minitrain.*Error.*\[({CODES})\]", re.DOTALL)  # by a version without an option, or a package


def main(rows: list[Row] = ROWS, worker: Path = HERE / "gpu_work.py") -> int:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the measurement that runs, too
    names = [row.name for row in rows if row.phase in arguments.phases]
    if not any(re.search(arguments.only, name) for name in names):
        sys.exit(f"--only {arguments.only}: expected a pattern of one of these: {'; '.join(names)}")
    machine = describe_machine(arguments.device, arguments.tiny)
    folder = arguments.results or HERE / "results"
    stem = f"{machine['date']}-{re.sub(r'[^a-z0-9]+', '-', machine['card'].lower()).strip('-')}"
    results: list[dict] = []
    with tempfile.TemporaryDirectory(prefix="minitrain-bench-") as scratch:
        models = arguments.models or scratch
        for phase in arguments.phases:
            end = time.monotonic() + 60 * (arguments.minutes or MINUTES[phase])
            for row in [row for row in rows if row.phase == phase and re.search(arguments.only, row.name)]:
                row = shortened(row) if arguments.tiny else row
                for needed in required(row, models, results):
                    add(measure(needed, arguments, models, worker, end), results, machine, folder, stem)
                add(measure(row, arguments, models, worker, end), results, machine, folder, stem)
    print(f"\n{gpu_report.as_markdown(results, machine)}\nwritten to {folder / stem}.md and .json")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", nargs="+", choices=list(MINUTES), default=list(MINUTES))
    parser.add_argument("--minutes", type=float, help="of each phase (default: 7, 9 and 9)")
    parser.add_argument("--only", default="", metavar="PATTERN", help="rows whose name has this regular expression")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few steps")
    parser.add_argument("--models", help="folder that keeps the models for another run (default: a temporary one)")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has the other trainers")
    parser.add_argument("--results", type=Path, help="folder of the results (default bench/results)")
    return parser.parse_args()


def describe_machine(device: str, tiny: bool) -> dict:
    import torch
    import transformers

    from minitrain.model.flops import peak_of

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench/gpu.py: torch finds no GPU. Try out the script with --tiny --device cpu.")
    card = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    return {
        "card": card + (", tiny" if tiny else ""),
        "date": str(datetime.date.today()),
        "peak": peak_of(card),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
        "driver": ask_card("driver_version") if device == "cuda" else "",
        "power limit": ask_card("power.limit") if device == "cuda" else "",
    }


def ask_card(what: str) -> str:
    """What nvidia-smi answers, empty without an answer."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip().splitlines()[0] if found.returncode == 0 and found.stdout.strip() else ""


def shortened(row: Row) -> Row:
    """The row with tiny models: few steps, few tokens, less time; of all losses, two."""
    options = row.options | ({"losses": ["sft", "dpo"]} if row.work == "losses" else {})
    steps, warmup = min(row.steps, 2), min(row.warmup, 1)
    sizes = {"tokens": row.tokens // 16, "pairs": min(row.pairs, 2), "steps": steps, "warmup": warmup}
    return replace(row, limit=min(row.limit, 60), options=options, **sizes)


def required(row: Row, models: str, results: list[dict]) -> list[Row]:
    """The row that builds the model, if it is not there and nobody has tried."""
    is_there = (Path(models) / row.shape / "model" / "tokenizer.json").exists()
    tried = any(result["row"].work == "build" and result["row"].shape == row.shape for result in results)
    if not row.shape or row.work == "build" or is_there or tried:
        return []
    return [Row(f"build {row.shape}", row.phase, "build", row.shape, limit=150)]


def add(result: dict, results: list[dict], machine: dict, folder: Path, stem: str) -> None:
    results.append(result)
    gpu_report.write(results, machine, folder, stem)
    numbers = gpu_report.rates(result, machine)
    summary = ", ".join(f"{key} {value:,.4g}" for key, value in numbers.items()) or result["why"]
    print(f"{result['row'].phase}: {result['row'].name}: {result['status']}; {summary}", flush=True)


# ---------------------------------------------------------------------------------------------------- measurements


def measure(row: Row, arguments: argparse.Namespace, models: str, worker: Path, end: float) -> dict:
    """Run a row in its own process until it ends, fails, or its time is over; keep what it has written."""
    sizes = asdict((TINY if arguments.tiny else SHAPES)[row.shape]) if row.shape else {}
    result = {"row": row, "sizes": sizes, "found": {}, "status": "skipped", "why": "", "watts": []}
    python = arguments.peer_python if row.work in PEERS else sys.executable
    if missing := [name for name in row.needs if not is_installed(name, python)]:
        return result | {"why": f"{', '.join(missing)} not installed"}
    left = end - time.monotonic()
    if left < SHORTEST and not arguments.tiny:
        return result | {"why": "no time was left in its phase"}
    if row.shape and row.work != "build" and not (Path(models) / row.shape / "model" / "tokenizer.json").exists():
        return result | {"why": f"the model {row.shape} could not be built"}
    with tempfile.TemporaryDirectory(prefix="minitrain-bench-job-") as scratch:
        job = asdict(row) | {"device": arguments.device, "sizes": sizes, "folder": models, "scratch": scratch}
        job["out"] = f"{scratch}/result.json"
        (Path(scratch) / "job.json").write_text(json.dumps(job))
        limit = min(row.limit, left) if not arguments.tiny else row.limit
        status, watts = run([python, str(worker), f"{scratch}/job.json"], scratch, limit, arguments.device)
        found = json.loads(Path(job["out"]).read_text()) if Path(job["out"]).exists() else {}
        errors = Path(scratch, "errors").read_text(errors="replace")
    if "skipped" in found:
        return result | {"why": found["skipped"]}
    if status == "failed" and REFUSED.search(errors):
        return result | {"why": f"refused: {last_lines(errors)}"}
    why = {"done": "", "failed": last_lines(errors), "limit": f"{limit:.0f} s"}[status]
    return result | {"found": found, "status": status, "why": why, "watts": watts}


def run(command: list[str], scratch: str, limit: float, device: str) -> tuple[str, list[float]]:
    """Run a command -> (done, failed or limit; the watts of the card while it ran)."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")])),
    }
    watts: list[float] = []
    with open(f"{scratch}/output", "wb") as output, open(f"{scratch}/errors", "wb") as errors:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=errors, start_new_session=True)
        end, last_read = time.monotonic() + limit, 0.0
        try:
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.1)
                if device == "cuda" and time.monotonic() - last_read > 2:
                    last_read = time.monotonic()
                    answer = ask_card("power.draw").split(" ")[0]
                    watts += [float(answer)] if re.fullmatch(r"[\d.]+", answer) else []
            status = "limit" if process.poll() is None else "done" if process.returncode == 0 else "failed"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with its own processes, such as those of a compiler
                process.wait()
    return status, watts


def is_installed(name: str, python: str) -> bool:
    if python == sys.executable:
        return importlib.util.find_spec(name) is not None
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    return shutil.which(python) is not None and subprocess.run([python, "-c", code]).returncode == 0


def last_lines(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[-2:])[-400:] or "no message"


if __name__ == "__main__":
    sys.exit(main())
