"""Where figures go: the console, metrics.jsonl always, and TensorBoard, wandb, swanlab when asked for.

Beside these the ledger: a line for every step, from which `minitrain compare` tells where two runs part.

A tracker that fails is switched off with one warning; it never stops training.
"""

import json
import math
import os
import resource
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from minitrain.batch import Batch
from minitrain.config.schema import Config
from minitrain.distributed.parallel import SingleDevice
from minitrain.io.redact import redact

METRICS, LEDGER, RUN_ID = "metrics.jsonl", "ledger.jsonl", "tracker_id"
Log = Callable[[int, str, dict[str, float]], None]


class Logged(NamedTuple):
    """What an interrupted run had logged before it was resumed.

    Attributes:
        step: That of the checkpoint. Later rows are computed again.
        rows: Those of `step` that are not.
        last_steps: Of each kind of row, the last step that was logged.
    """

    step: int
    rows: list[dict]
    last_steps: dict[str | None, int]


class ThroughputMeter:
    """Counts of the steps since the log line before."""

    def __init__(self, step: int):
        self.start, self.step = time.perf_counter(), step
        self.tokens = self.places = 0

    def count(self, batch: Batch) -> None:
        self.tokens += batch.n_tokens
        self.places += batch.input_ids.numel()

    def figures(self, step: int, total_steps: int, parallel: SingleDevice) -> dict[str, float]:
        """Tokens, speed, padding and the largest peak of memory over all ranks, and the time that is left."""
        seconds = time.perf_counter() - self.start
        tokens, places = parallel.sum(torch.tensor([self.tokens, self.places])).tolist()
        return {
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "padding": 1 - tokens / places,
            "memory_gb": parallel.max(peak_memory_gb(parallel.device)),
            "eta_seconds": (total_steps - step) * seconds / (step - self.step),
        }


class MetricLogger:
    """Sends figures to all trackers, and lines to the console past the progress bar."""

    def __init__(self, config: Config, folder: Path, settings: dict, logged: Logged | None = None, speaks: bool = True):
        """`speaks` is false on all ranks but the first, which then write nothing anywhere."""
        self.speaks, self.quiet = speaks, config.quiet
        self.bar: tqdm | None = None
        self.sinks: dict[str, tuple[Callable, Callable]] = {}  # name -> (log, close)
        if not speaks:
            return
        self._open(METRICS, lambda: _metrics(folder))
        if config.ledger:
            self._open(LEDGER, lambda: _jsonl(folder / LEDGER))
        if config.report_to_tensorboard and not config.debug:
            self._open("tensorboard", lambda: _tensorboard(folder, logged))
        if config.wandb.enabled and not config.debug:
            self._open("wandb", lambda: _wandb(config, folder, settings, logged))
        if config.swanlab.enabled and not config.debug:
            self._open("swanlab", lambda: _swanlab(config, folder, settings, logged))

    def log(self, step: int, kind: str, figures: dict[str, float]) -> None:
        """`kind` is train or eval; trackers see `kind/name`."""
        for name, (log, _) in list(self.sinks.items()):
            if name != LEDGER:
                self._guard(name, lambda log=log: log(step, kind, figures))

    def log_step(self, step: int, tokens: Callable[[], str], loss: float, grad_norm: float) -> None:
        """A line in the ledger: a hash of the step's tokens, its loss and gradient norm to the last bit."""
        if LEDGER in self.sinks:
            write, _ = self.sinks[LEDGER]
            row = {"step": step, "tokens": tokens(), "loss": loss, "grad_norm": grad_norm}
            self._guard(LEDGER, lambda: write(row))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        for name, (_, close) in list(self.sinks.items()):
            self._guard(name, close)
        self.sinks.clear()

    def info(self, line: str = "") -> None:
        """A line on the console, above the progress bar; none when it is to be quiet."""
        if not self.quiet:
            self.warning(line)

    def warning(self, *lines: str) -> None:
        """Lines on the console in any case."""
        if not self.speaks:
            return
        try:
            for line in lines:
                tqdm.write(redact(line))
            sys.stdout.flush()
        except OSError:  # nobody reads any more; training goes on
            self.speaks = False
            sys.stdout = open(os.devnull, "w")

    def start_bar(self, total: int, done: int) -> None:
        if self.speaks and not self.quiet:
            self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, disable=None, leave=False)

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def _open(self, name: str, make: Callable) -> None:
        self._guard(name, lambda: self.sinks.update({name: make()}))

    def _guard(self, name: str, action: Callable) -> None:
        try:
            action()
        except Exception as error:
            self.sinks.pop(name, None)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.warning(f"warning: {name} failed and is switched off, training goes on: {reason}")


def train_line(step: int, total: int, figures: dict[str, float]) -> str:
    """One readable line of a log step."""
    digits = len(str(total))
    parts = [f"step {step:>{digits}}/{total}"]
    for name, value in figures.items():
        if name in _LINE_FORMATS:
            parts.append(_LINE_FORMATS[name](value))
    return "  ".join(parts)


def eval_line(step: int, figures: dict[str, float]) -> str:
    shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items() if name not in ("seconds",))
    return f"eval at step {step}  {shown}"


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far in GB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


_LINE_FORMATS: dict[str, Callable[[float], str]] = {
    "loss": lambda v: f"loss {v:.4f}",
    "accuracy": lambda v: f"accuracy {v:.1%}",
    "lr": lambda v: f"lr {v:.2e}",
    "grad_norm": lambda v: f"grad_norm {v:.3g}",
    "tokens_per_second": lambda v: f"{v:,.0f} tok/s",
    "padding": lambda v: f"padding {v:.0%}",
    "memory_gb": lambda v: f"mem {v:.2f} GB",
    "eta_seconds": lambda v: f"eta {duration(v)}",
}


def _jsonl(path: Path) -> tuple[Callable, Callable]:
    file = open(path, "a", buffering=1, encoding="utf-8")

    def write(row: dict) -> None:
        # JSON has no NaN; a text keeps the line readable for every parser.
        plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        file.write(json.dumps(plain) + "\n")

    return write, file.close


def _metrics(folder: Path) -> tuple[Callable, Callable]:
    write, close = _jsonl(folder / METRICS)
    return lambda step, kind, figures: write({"step": step, "kind": kind, **figures}), close


def _tensorboard(folder: Path, logged: Logged | None) -> tuple[Callable, Callable]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=None if logged is None else logged.step)

    def log(step: int, kind: str, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(f"{kind}/{name}", value, step)
        writer.flush()

    for row in () if logged is None else logged.rows:  # purged with the later ones
        log(row["step"], row["kind"], {name: float(row[name]) for name in row.keys() - {"step", "kind"}})
    return log, writer.close


def _wandb(config: Config, folder: Path, settings: dict, logged: Logged | None) -> tuple[Callable, Callable]:
    import wandb

    run = wandb.init(
        project=config.wandb.project,
        entity=config.wandb.entity,
        name=config.exp_name,
        dir=os.environ.get("WANDB_DIR", str(folder)),
        config=settings,
        settings=wandb.Settings(silent=True),
        id=_run_id(folder),
        resume=None if logged is None else "allow",
    )

    def log(step: int, kind: str, figures: dict[str, float]) -> None:
        run.log({f"{kind}/{name}": value for name, value in figures.items()} | {"step": step})

    return _only_new(log, logged), run.finish


def _swanlab(config: Config, folder: Path, settings: dict, logged: Logged | None) -> tuple[Callable, Callable]:
    import swanlab

    resume = {"id": _run_id(folder), "resume": "allow"} if config.swanlab.mode == "cloud" else {}  # others cannot
    run = swanlab.init(
        project=config.swanlab.project,
        experiment_name=config.exp_name,
        logdir=str(folder / "swanlab"),
        config=settings,
        mode=config.swanlab.mode,
        **resume,
    )

    def log(step: int, kind: str, figures: dict[str, float]) -> None:
        run.log({f"{kind}/{name}": value for name, value in figures.items()}, step=step)

    return _only_new(log, logged), swanlab.finish


def _run_id(folder: Path) -> str:
    """The id of this run with wandb and SwanLab, made when it starts and kept, so that it can be resumed."""
    file = folder / RUN_ID
    if file.exists() and (found := file.read_text(errors="replace").strip()).isalnum() and found.isascii():
        return found
    made = uuid.uuid4().hex[:21]
    file.write_text(made)
    return made


def _only_new(log: Log, logged: Logged | None) -> Log:
    """Leave out rows that were logged before the interruption: they cannot be taken back, and come again the same."""
    last_steps = {} if logged is None else logged.last_steps
    return lambda step, kind, figures: log(step, kind, figures) if step > last_steps.get(kind, -1) else None
