"""What the trainer says: the lines at the start of a run, and the metrics of each log line.

Functions that get the trainer, as hooks do.
"""

import sys
from typing import TYPE_CHECKING

from minitrain.io.redact import redact

from .metric_logger import ThroughputMeter, duration, train_line
from .metrics import MetricAccumulator

if TYPE_CHECKING:
    from minitrain.trainer import Trainer


def report_start(trainer: "Trainer") -> None:
    """Say what is trained on what, and where it resumes."""
    trainer.logger.warning(*(f"warning: {line}" for line in trainer.warnings))
    for line in (*trainer.notes, _description(trainer)):
        trainer.logger.info(line)
    if trainer.checkpoint is not None:
        trainer.logger.info(f"going on from {trainer.checkpoint}")
    if trainer.save_schedule.every is None:
        interval = duration(trainer.save_schedule.interval)
        trainer.logger.info(f"a checkpoint about every {interval}, at most 2 % of the time (save_every_steps)")


def warn(trainer: "Trainer", line: str) -> None:
    """Show a line on the console, outside of `train()`, too."""
    if trainer.logger is not None:
        trainer.logger.warning(line)
    elif trainer.parallel.rank == 0:
        print(redact(line), file=sys.stderr)


def start_window(trainer: "Trainer") -> None:
    """Start the means of the next log line, which are exact over the steps since the line before."""
    trainer.totals = MetricAccumulator(trainer.device)
    trainer.window = ThroughputMeter(trainer.step)


def log_train(trainer: "Trainer") -> None:
    """Log the means of the window, and start the next one."""
    trainer.train_metrics = trainer.loss.finalize_metrics(trainer.totals.means(trainer.parallel)) | {
        "lr": trainer.optimizer.param_groups[0]["lr"],
        "grad_norm": trainer.grad_norm,
        "epoch": trainer.consumed / trainer.train_loader.epoch_size,
        **trainer.window.figures(trainer.step, trainer.total_steps, trainer.parallel),
    }
    trainer.logger.log(trainer.step, "train", trainer.train_metrics)
    trainer.logger.info(train_line(trainer.step, trainer.total_steps, trainer.train_metrics))
    start_window(trainer)


def _description(trainer: "Trainer") -> str:
    config = trainer.config
    total = sum(p.numel() for p in trainer.policy.parameters())
    trained = sum(p.numel() for p in trainer.parameters)
    held = f", {len(trainer.eval_loader.examples):,} to evaluate on" if trainer.eval_loader else ""
    ranks = f"{trainer.parallel.world_size} x " if trainer.parallel.world_size > 1 else ""
    return (
        f"{config.model.name_or_path}: {trained:,} of {total:,} parameters trained on {ranks}{trainer.device} in "
        f"{config.model.policy_dtype}; {len(trainer.train_loader.examples):,} examples{held}; "
        f"{trainer.total_steps} steps of {config.total_batch_size}; loss {config.loss['name']}"
    )
