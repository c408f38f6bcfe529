"""Logging of metrics: to the console and metrics.jsonl, and to the trackers that are enabled.

The ledger has a line for every step, in which `minitrain compare` finds the first step where two runs differ.
samples.jsonl has the answers that evaluations show, for `minitrain plot --html`.

A tracker that fails is switched off with one warning. It never stops training.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minitrain.batch import Batch
from minitrain.config.schema import Config
from minitrain.distributed.parallel import SingleDevice
from minitrain.io.redact import redact
from minitrain.io.system import in_notebook, peak_memory
from minitrain.model.flops import ModelFlops, peak_flops

from .metrics_log import METRICS, SAMPLES
from .trackers import TRACKERS, Logged, is_enabled

LEDGER = "ledger.jsonl"


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
        if config.eval_generate.n_examples and config.eval_generate.show:
            self._open(SAMPLES, lambda: _jsonl(folder / SAMPLES))
        for name, start in TRACKERS.items():
            if is_enabled(config, name) and not config.debug:
                self._open(name, lambda start=start: start(config, folder, settings, logged))

    def log(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        """Send metrics to all trackers as `kind/name`, where `kind` is train, eval or rollout."""
        for name, (log, _) in list(self.backends.items()):
            if name not in (LEDGER, SAMPLES):
                self._guard(name, lambda log=log: log(step, kind, metrics))

    def log_step(self, step: int, tokens: Callable[[], str], loss: float, grad_norm: float) -> None:
        """Write a line to the ledger: a hash of the step's tokens, and its exact loss and gradient norm."""
        if LEDGER in self.backends:
            self._write(LEDGER, {"step": step, "tokens": tokens(), "loss": loss, "grad_norm": grad_norm})

    def log_sample(self, step: int, sample: dict[str, Any]) -> None:
        """Write an answer of an evaluation to samples.jsonl."""
        self._write(SAMPLES, {"step": step, **sample})

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
            disable = False if in_notebook() else None  # None: show it on a terminal only
            self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, disable=disable, leave=False)

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def _write(self, name: str, row: dict[str, Any]) -> None:
        if name in self.backends:
            self._guard(name, lambda: self.backends[name][0](row))

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
    return peak_memory() / 1e9


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
