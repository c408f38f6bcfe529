"""What the trainer does before, between and after optimizer steps: report, evaluate, save, stop.

These functions receive the trainer, like hooks, and keep their state in it.
"""

import math
import signal
import sys
import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from minitrain.errors import ConfigError, RunError
from minitrain.io.redact import redact

from .checkpoint import restore_rng
from .compute import describe_compute, speed_hints
from .failpoints import failpoint
from .metric_logger import ThroughputMeter, duration, eval_line, train_line
from .saving import save_if_due, save_model
from .step import MetricAccumulator
from .time_limit import TIMEOUT

if TYPE_CHECKING:
    from minitrain.trainer import Trainer

LOWER_IS_BETTER = ("loss", "perplexity", "kl", "kl_to_start", "length", "length_max", "turns", "unjudged")
KNOWN_METRICS = ("loss", "exact_match")  # of every loss; the check of the config knows whether exact_match is on


def count_bad_step(trainer: "Trainer") -> None:
    """Report a step with a non-finite loss or gradient. Raise RunError after `max_bad_steps` consecutive ones."""
    trainer.bad_steps += 1
    warn(trainer, f"step {trainer.step}: loss or gradient is not finite, so the step is skipped")
    if trainer.bad_steps >= trainer.config.max_bad_steps:
        raise RunError(
            f"loss or gradient was not finite for {trainer.bad_steps} consecutive steps (up to step {trainer.step}); "
            "the weights are unchanged since then. Lower lr, check the data, or locate the operation with debug=true.",
            "not-finite",
        )


def begin(trainer: "Trainer") -> None:
    """Report, call hooks and evaluate before the first step."""
    report_start(trainer)
    trainer.call_hook("on_train_begin")
    failpoint("train.begin")
    if should_evaluate(trainer):
        run_evaluation(trainer)
    if trainer.checkpoint is not None:  # last, so that nothing draws from it before the first step
        restore_rng(trainer.checkpoint, trainer.parallel)


def after_step(trainer: "Trainer") -> None:
    """Log, call hooks, evaluate and save, each if it is due."""
    config, last = trainer.config, trainer.step == trainer.total_steps
    if trainer.step % config.log_every_steps == 0 or last:
        log_train(trainer)
    trainer.call_hook("on_step_end")
    if trainer.run.pending is not None:
        trainer.run.finish_saving(wait=False)
    if should_evaluate(trainer):
        run_evaluation(trainer)
    if config.save_models_every_steps and trainer.step % config.save_models_every_steps == 0 and not last:
        save_model(trainer, trainer.run.model(trainer.step))
    save_if_due(trainer)
    failpoint("step.end")


def finish(trainer: "Trainer") -> None:
    """Evaluate and save the final model, unless a signal arrives."""
    if trainer.evaluated_step != trainer.step:
        run_evaluation(trainer)
    if trainer.signal is not None:
        return
    save_model(trainer, trainer.run.final)
    trainer.run.finish(trainer.step, trainer.total_steps)
    if trainer.save_schedule.count:
        trainer.logger.info(trainer.save_schedule.summary())
    trainer.logger.info(
        f"done: {trainer.run.final}" + (f", best: {trainer.run.best}" if trainer.run.best.exists() else "")
    )


def report_stop(trainer: "Trainer", step: int, evaluated_step: int | None) -> None:
    """Report what stopped a run. Raise RunError if time was up before anything was done that a resumed run keeps.

    Args:
        step: The step that the run began at.
        evaluated_step: The step that was evaluated last before that.
    """
    is_timeout = trainer.signal == TIMEOUT
    if is_timeout and (trainer.step, trainer.evaluated_step) == (step, evaluated_step):
        raise RunError(
            f"max_minutes: {trainer.config.max_minutes:g} minutes are over before the first step or evaluation at step "
            f"{step} ended, so no number of restarts would finish the run. Raise it.",
            "out-of-range",
        )
    name = "max_minutes" if is_timeout else signal.Signals(trainer.signal).name
    trainer.logger.warning(f"stopped by {name} at step {trainer.step}. Rerun the same command to resume.")


def is_late(trainer: "Trainer", next_step: bool = False) -> bool:
    """Return whether the run must stop now so that its checkpoint is written within `max_minutes`.

    Args:
        next_step: Whether a step and the evaluation after it would come first. They are expected to take as long as the
            longest recent step and the last evaluation.
    """
    limit, seconds, following = trainer.time_limit, trainer.save_schedule.cost, trainer.step + 1
    if next_step and following <= trainer.total_steps:
        seconds += limit.longest_step
    every = trainer.config.eval_every_steps
    if next_step and (following >= trainer.total_steps or (every > 0 and following % every == 0)):
        seconds += trainer.eval_metrics.get("seconds", 0.0)
    return limit.is_up(seconds)


def should_evaluate(trainer: "Trainer") -> bool:
    """Return whether an evaluation of this step is due, which includes one that a signal interrupted."""
    config, every = trainer.config, trainer.config.eval_every_steps
    if trainer.step == 0:  # an unknown metric should not be reported only after hours
        known = (*KNOWN_METRICS, *(["reward"] if trainer.loss.online else []))
        is_due = config.do_first_eval or config.early_stopping.metric not in known
    else:
        is_due = every > 0 and trainer.step % every == 0 and trainer.step < trainer.total_steps
    return is_due and trainer.evaluated_step != trainer.step


def run_evaluation(trainer: "Trainer") -> None:
    """Evaluate, log, and update the best model and early stopping."""
    if trainer.eval_loader is None:
        return
    began = time.perf_counter()
    trainer.parallel.set_status(f"the evaluation at step {trainer.step}")
    metrics = trainer.evaluate()
    if not metrics:
        return
    metrics = trainer.parallel.run_on_rank0(lambda: metrics)  # so that all ranks use the same numbers, to the last bit
    trainer.eval_metrics = metrics | {"seconds": time.perf_counter() - began}
    trainer.evaluated_step = trainer.step
    trainer.logger.log(trainer.step, "eval", trainer.eval_metrics)
    trainer.logger.info(eval_line(trainer.step, metrics))
    _update_best(trainer, metrics)
    trainer.call_hook("on_eval_end")
    trainer.window.start += time.perf_counter() - began  # not counted in tokens per second
    trainer.time_limit.leave_out(trainer.eval_metrics["seconds"])


def check_metric(metric: str, known: Collection[str]) -> None:
    """Raise ConfigError for a metric that the evaluation does not have."""
    if metric not in known:
        raise ConfigError(
            f"early_stopping.metric: unknown metric {metric!r}. Use one of {', '.join(known)}.", "not-a-choice"
        )


def best_metric(trainer: "Trainer") -> str:
    """Return the metric that selects the best model. Sampled answers have a reward instead of a loss."""
    metric = trainer.config.early_stopping.metric
    return "reward" if metric == "loss" and trainer.loss.online else metric


def is_lower_better(metric: str) -> bool:
    """Return whether lower values of a metric are better. Higher rewards are, whatever their functions are named."""
    return not metric.startswith(("reward", "pass@")) and metric.endswith(LOWER_IS_BETTER)


def _warn_without_best(trainer: "Trainer") -> None:
    """Warn if `save_best` is set but best/ does not exist, as when `save_best` was not set before."""
    metric, best = best_metric(trainer), trainer.best
    if trainer.config.save_best and not trainer.run.best.exists():
        value = f"nan at step {trainer.step}" if best is None else f"not better than the best so far, {best:.6g}"
        trainer.logger.warning(f"warning: {trainer.run.best} does not exist: {metric} is {value}")


def _update_best(trainer: "Trainer", metrics: dict[str, float]) -> None:
    """Save the model if it is the best so far. Stop training after `early_stopping.patience` others."""
    config, stopping = trainer.config, trainer.config.early_stopping
    metric = best_metric(trainer)
    check_metric(metric, metrics)
    value = metrics[metric]
    sign = -1 if is_lower_better(metric) else 1
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
            f"stopping early: {metric} has not improved in {trainer.evals_without_improvement} evaluations"
        )
        trainer.should_stop = True


def report_start(trainer: "Trainer") -> None:
    """Report warnings, what is trained on which data, and the checkpoint that training resumes from."""
    trainer.logger.warning(*(f"warning: {line}" for line in trainer.warnings))
    compute = f"compute: {describe_compute(trainer.config, trainer.policy)}"
    for line in (*trainer.notes, compute, _description(trainer)):
        trainer.logger.info(line)
    if hints := speed_hints(trainer.config, trainer.device):
        trainer.logger.info(f"usually faster on a GPU: {'; '.join(hints)} (docs/gpu.md)")
    if trainer.checkpoint is not None:
        trainer.logger.info(f"resuming from {trainer.checkpoint}")
    if trainer.save_schedule.every is None:
        interval = duration(trainer.save_schedule.interval)
        trainer.logger.info(f"a checkpoint about every {interval}, using at most 2% of the time (save_every_steps)")


def warn(trainer: "Trainer", line: str) -> None:
    """Print a line on the console, also outside `train()`."""
    if trainer.logger is not None:
        trainer.logger.warning(line)
    elif trainer.parallel.rank == 0:
        print(redact(line), file=sys.stderr)


def start_window(trainer: "Trainer") -> None:
    """Start the accumulation of the next log line, whose means are exact over all steps since the last one."""
    trainer.totals = MetricAccumulator(trainer.device)
    trainer.window = ThroughputMeter(trainer.step, trainer.policy.flops, trainer.device)


def log_train(trainer: "Trainer") -> None:
    """Log the metrics since the last log line, and start the next window."""
    trainer.train_metrics = trainer.loss.finalize_metrics(trainer.totals.means(trainer.parallel)) | {
        "lr": float(trainer.optimizer.param_groups[0]["lr"]),
        "grad_norm": trainer.grad_norm,
        "epoch": trainer.consumed / trainer.train_loader.epoch_size,
        **trainer.window.compute(trainer.step, trainer.total_steps, trainer.parallel),
    }
    trainer.logger.log(trainer.step, "train", trainer.train_metrics)
    trainer.logger.info(train_line(trainer.step, trainer.total_steps, trainer.train_metrics))
    start_window(trainer)


def _description(trainer: "Trainer") -> str:
    config = trainer.config
    total = sum(p.numel() for p in trainer.policy.parameters())
    trained = sum(p.numel() for p in trainer.parameters)
    eval_examples = f", {len(trainer.eval_loader.examples):,} for evaluation" if trainer.eval_loader else ""
    if trainer.retention_loader:
        eval_examples += f", {len(trainer.retention_loader.examples):,} of retention_datasets"
    examples, of_step = f"{len(trainer.train_loader.examples):,} examples", f"{config.total_batch_size}"
    if trainer.loss.online:
        examples = f"{len(trainer.train_loader.prompts):,} prompts"
        of_step += f" prompts with {config.rollout.num_generations} answers each"
    ranks = f"{trainer.parallel.world_size} x " if trainer.parallel.world_size > 1 else ""
    return (
        f"{config.model.name_or_path}: {trained:,} of {total:,} parameters trained on {ranks}{trainer.device}; "
        f"{examples}{eval_examples}; {trainer.total_steps} steps of {of_step}; "
        f"loss {config.loss['name']}"
    )
