"""Logging of metrics: to the console and metrics.jsonl, and to TensorBoard, wandb and swanlab if they are enabled.

The ledger has a line for every step, in which `minitrain compare` finds the first step where two runs differ.

A tracker that fails is switched off with one warning. It never stops training.
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
from minitrain.model.flops import ModelFlops, peak_flops

METRICS, LEDGER, RUN_ID = "metrics.jsonl", "ledger.jsonl", "tracker_id"
Log = Callable[[int, str, dict[str, float]], None]


class Logged(NamedTuple):
    """What an interrupted run had logged before it was resumed.

    Attributes:
        step: Step of the checkpoint. Later rows are computed again.
        rows: Rows of `step` that are not computed again.
        last_steps: The last step that was logged, for each kind of row.
    """

    step: int
    rows: list[dict]
    last_steps: dict[str | None, int]


class ThroughputMeter:
    """Counts tokens and time since the last log line, and FLOPs on a GPU whose peak is known."""

    def __init__(self, step: int, flops: ModelFlops | None, device: torch.device):
        self.start, self.step = time.perf_counter(), step
        self.tokens = self.positions = 0
        self.flops, self.peak, self.gflops = flops, None if flops is None else peak_flops(device), 0.0

    def update(self, batch: Batch) -> None:
        self.tokens += batch.n_tokens
        self.positions += batch.input_ids.numel()
        if self.peak is not None:
            self.gflops += self.flops.of(batch) / 1e9

    def compute(self, step: int, total_steps: int, parallel: SingleDevice) -> dict[str, float]:
        """Return tokens, speed and padding over all ranks, the largest peak memory, and the remaining time."""
        seconds = time.perf_counter() - self.start
        counts = torch.tensor([self.tokens, self.positions, round(self.gflops)])
        tokens, positions, gflops = parallel.sum(counts).tolist()
        used = {} if self.peak is None else {"mfu": 1e9 * gflops / (seconds * self.peak * parallel.world_size)}
        return {
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            **used,
            "padding": 1 - tokens / positions,
            "memory_gb": parallel.max(peak_memory_gb(parallel.device)),
            "eta_seconds": (total_steps - step) * seconds / (step - self.step),
        }


class MetricLogger:
    """Sends metrics to all trackers, and lines to the console, above the progress bar."""

    def __init__(
        self, config: Config, folder: Path, settings: dict, logged: Logged | None = None, enabled: bool = True
    ):
        """
        Args:
            folder: The run directory.
            settings: The config, as trackers get it.
            logged: What was logged before the run was resumed.
            enabled: False on all ranks but the first, which then write nothing.
        """
        self.enabled, self.quiet = enabled, config.quiet
        self.bar: tqdm | None = None
        self.backends: dict[str, tuple[Callable, Callable]] = {}  # name -> (log, close)
        if not enabled:
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

    def log(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        """Send metrics to all trackers as `kind/name`, where `kind` is train, eval or rollout."""
        for name, (log, _) in list(self.backends.items()):
            if name != LEDGER:
                self._guard(name, lambda log=log: log(step, kind, metrics))

    def log_step(self, step: int, tokens: Callable[[], str], loss: float, grad_norm: float) -> None:
        """Write a line to the ledger: a hash of the step's tokens, and its exact loss and gradient norm."""
        if LEDGER in self.backends:
            write, _ = self.backends[LEDGER]
            row = {"step": step, "tokens": tokens(), "loss": loss, "grad_norm": grad_norm}
            self._guard(LEDGER, lambda: write(row))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        for name, (_, close) in list(self.backends.items()):
            self._guard(name, close)
        self.backends.clear()

    def info(self, line: str = "") -> None:
        """Print a line above the progress bar, unless `quiet` is set."""
        if not self.quiet:
            self.warning(line)

    def warning(self, *lines: str) -> None:
        """Print lines above the progress bar, even if `quiet` is set."""
        if not self.enabled:
            return
        try:
            for line in lines:
                tqdm.write(redact(line))
            sys.stdout.flush()
        except OSError:  # the reader of the pipe is gone; training continues
            self.enabled = False
            sys.stdout = open(os.devnull, "w")

    def start_bar(self, total: int, done: int) -> None:
        if self.enabled and not self.quiet:
            self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, disable=None, leave=False)

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def _open(self, name: str, create: Callable) -> None:
        self._guard(name, lambda: self.backends.update({name: create()}))

    def _guard(self, name: str, action: Callable) -> None:
        try:
            action()
        except Exception as error:
            self.backends.pop(name, None)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.warning(f"warning: {name} failed and is switched off; training continues: {reason}")


def train_line(step: int, total: int, metrics: dict[str, float]) -> str:
    """Return the console line of a training step."""
    digits = len(str(total))
    parts = [f"step {step:>{digits}}/{total}"]
    for name, value in metrics.items():
        if name in _LINE_FORMATS:
            parts.append(_LINE_FORMATS[name](value))
    return "  ".join(parts)


def eval_line(step: int, metrics: dict[str, float]) -> str:
    """Return the console line of an evaluation."""
    shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name != "seconds")
    return f"eval at step {step}  {shown}"


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory so far in GB: of the GPU or, on a CPU, of this process."""
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
    "mfu": lambda v: f"mfu {v:.0%}",
    "padding": lambda v: f"padding {v:.0%}",
    "memory_gb": lambda v: f"mem {v:.2f} GB",
    "eta_seconds": lambda v: f"eta {duration(v)}",
}


def _jsonl(path: Path) -> tuple[Callable, Callable]:
    file = open(path, "a", buffering=1, encoding="utf-8")

    def write(row: dict) -> None:
        # JSON has no NaN; as a string, every parser can read the line.
        plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        file.write(json.dumps(plain) + "\n")

    return write, file.close


def _metrics(folder: Path) -> tuple[Callable, Callable]:
    write, close = _jsonl(folder / METRICS)
    return lambda step, kind, metrics: write({"step": step, "kind": kind, **metrics}), close


def _tensorboard(folder: Path, logged: Logged | None) -> tuple[Callable, Callable]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=None if logged is None else logged.step)

    def log(step: int, kind: str, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(f"{kind}/{name}", value, step)
        writer.flush()

    for row in () if logged is None else logged.rows:  # these were purged with the later ones
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

    def log(step: int, kind: str, metrics: dict[str, float]) -> None:
        run.log({f"{kind}/{name}": value for name, value in metrics.items()} | {"step": step})

    return _only_new(log, logged), run.finish


def _swanlab(config: Config, folder: Path, settings: dict, logged: Logged | None) -> tuple[Callable, Callable]:
    import swanlab

    resume = (
        {"id": _run_id(folder), "resume": "allow"} if config.swanlab.mode == "cloud" else {}
    )  # other modes cannot resume
    run = swanlab.init(
        project=config.swanlab.project,
        experiment_name=config.exp_name,
        logdir=str(folder / "swanlab"),
        config=settings,
        mode=config.swanlab.mode,
        **resume,
    )

    def log(step: int, kind: str, metrics: dict[str, float]) -> None:
        run.log({f"{kind}/{name}": value for name, value in metrics.items()}, step=step)

    return _only_new(log, logged), swanlab.finish


def _run_id(folder: Path) -> str:
    """Return the id of this run for wandb and SwanLab, saved in the run directory for resuming."""
    file = folder / RUN_ID
    if file.exists() and (run_id := file.read_text(errors="replace").strip()).isalnum() and run_id.isascii():
        return run_id
    run_id = uuid.uuid4().hex[:21]
    file.write_text(run_id)
    return run_id


def _only_new(log: Log, logged: Logged | None) -> Log:
    """Skip rows that were logged before the interruption: they cannot be removed, and are computed again unchanged."""
    last_steps = {} if logged is None else logged.last_steps
    return lambda step, kind, metrics: log(step, kind, metrics) if step > last_steps.get(kind, -1) else None
