"""Check minitrain with every model type of the installed transformers: ``python -m tests.architectures [KIND ...]``."""

import argparse
import contextlib
import io
import json
import os
import tempfile
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "WANDB_MODE": "offline"}

import torch
import transformers

from tests.architectures.outcomes import FILE, GROUPS, OK, Outcome, Table, run_checks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="model types (default: all)")
    parser.add_argument("--classifiers", action="store_true", help="only those with a head for labels")
    parser.add_argument("--causal", action="store_true", help="only causal language models")
    parser.add_argument("--checks", default="", help="names of checks, separated by commas (default: all)")
    parser.add_argument("--out", type=Path, help="a file that receives a line of JSON for each model type")
    parser.add_argument("--update", action="store_true", help=f"write the outcomes to {FILE.name} as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table()
    table.transformers = transformers.__version__
    chosen = [name for name in GROUPS if getattr(arguments, name)] or list(GROUPS)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        for group in chosen:
            for kind in [kind for kind in GROUPS[group].kinds if not arguments.kinds or kind in arguments.kinds]:
                outcomes = _examine(group, kind, tuple(filter(None, arguments.checks.split(","))), arguments.out)
                table.rows[group][kind] = table.rows[group].get(kind, {}) | outcomes
    if arguments.update:
        table.rows = {
            group: {kind: rows[kind] for kind in GROUPS[group].kinds if kind in rows}
            for group, rows in table.rows.items()
        }
        table.write()


def _examine(group: str, kind: str, checks: tuple[str, ...], out: Path | None) -> dict[str, Outcome]:
    start = time.perf_counter()
    silent = io.StringIO()
    with (
        contextlib.redirect_stdout(silent),
        contextlib.redirect_stderr(silent),
        tempfile.TemporaryDirectory() as folder,
    ):
        outcomes = run_checks(group, kind, Path(folder), checks)
    seconds = round(time.perf_counter() - start, 1)
    others = {check: outcome for check, outcome in outcomes.items() if outcome != OK}
    print(f"{group} {kind} {seconds}s", *(f"\n    {c}: {o.word}: {o.reason}" for c, o in others.items()), flush=True)
    if out is not None:
        row = {"group": group, "kind": kind, "seconds": seconds}
        with out.open("a") as file:
            file.write(json.dumps(row | {check: ": ".join(filter(None, o)) for check, o in outcomes.items()}) + "\n")
    return outcomes


if __name__ == "__main__":
    main()
