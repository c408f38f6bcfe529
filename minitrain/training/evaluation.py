"""When the trainer evaluates, what it logs of it, and what follows: the best model and early stopping.

Functions that get the trainer, as hooks do, and keep their state in it.
"""

import math
import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from minitrain.errors import ConfigError

from .metric_logger import eval_line
from .metrics import lower_is_better
from .saving import save_model

ALWAYS_THERE = ("loss", "exact_match")  # metrics; the config check knows whether there is exact_match

if TYPE_CHECKING:
    from minitrain.trainer import Trainer


def should_evaluate(trainer: "Trainer") -> bool:
    """Return whether this step has an evaluation that was not made yet, as when a signal came instead of it."""
    config, every = trainer.config, trainer.config.eval_every_steps
    if trainer.step == 0:  # a metric that does not exist should not be reported after hours
        wanted = config.do_first_eval or config.early_stopping.metric not in ALWAYS_THERE
    else:
        wanted = every > 0 and trainer.step % every == 0 and trainer.step < trainer.total_steps
    return wanted and trainer.evaluated_step != trainer.step


def run_evaluation(trainer: "Trainer") -> None:
    """Evaluate, log, keep the best model, count towards early stopping."""
    if trainer.eval_loader is None:
        return
    began = time.perf_counter()
    trainer.parallel.set_status(f"the evaluation at step {trainer.step}")
    metrics = trainer.evaluate()
    if not metrics:
        return
    metrics = trainer.parallel.run_on_rank0(lambda: metrics)  # so that all ranks judge the same, to the last bit
    trainer.eval_metrics = metrics | {"seconds": time.perf_counter() - began}
    trainer.evaluated_step = trainer.step
    trainer.logger.log(trainer.step, "eval", trainer.eval_metrics)
    trainer.logger.info(eval_line(trainer.step, metrics))
    _update_best(trainer, metrics)
    trainer.call_hook("on_eval_end")
    trainer.window.start += time.perf_counter() - began  # not counted in tokens per second


def check_metric(metric: str, known: Collection[str]) -> None:
    """Raise ConfigError for a metric that the evaluation does not have."""
    if metric not in known:
        raise ConfigError(
            f"early_stopping.metric: there is no {metric!r}; there are {', '.join(known)}", "not-a-choice"
        )


def _warn_without_best(trainer: "Trainer") -> None:
    """Say that best/ does not exist although `save_best` is set, as when it was not set or the folder was removed."""
    metric, best = trainer.config.early_stopping.metric, trainer.best
    if trainer.config.save_best and not trainer.run.best.exists():
        value = f"nan at step {trainer.step}" if best is None else f"not better than {best:.6g}, the best before"
        trainer.logger.warning(f"warning: {trainer.run.best} does not exist: {metric} is {value}")


def _update_best(trainer: "Trainer", metrics: dict[str, float]) -> None:
    """Save the model if it is the best so far; stop training after `early_stopping.patience` that were not."""
    config, stopping = trainer.config, trainer.config.early_stopping
    check_metric(stopping.metric, metrics)
    value = metrics[stopping.metric]
    sign = -1 if lower_is_better(stopping.metric) else 1
    improved = trainer.best is None or sign * (value - trainer.best) > stopping.threshold
    if improved and not math.isnan(value):
        trainer.best, trainer.evals_without_improvement = value, 0
        if config.save_best:
            save_model(trainer, trainer.run.best)
        return
    _warn_without_best(trainer)
    trainer.evals_without_improvement += 1
    if (
        stopping.patience
        and trainer.evals_without_improvement >= stopping.patience
        and trainer.step < trainer.total_steps
    ):
        trainer.logger.info(
            f"stopping early: {stopping.metric} has not improved in {trainer.evals_without_improvement} evaluations"
        )
        trainer.should_stop = True
