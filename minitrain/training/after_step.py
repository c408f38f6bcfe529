"""What follows an optimizer step, and what follows the last one.

Functions that get the trainer, as hooks do.
"""

from typing import TYPE_CHECKING

from minitrain.errors import RunError

from .evaluation import run_evaluation, should_evaluate
from .failpoints import failpoint
from .reporting import log_train, warn
from .saving import save_if_due, save_model

if TYPE_CHECKING:
    from minitrain.trainer import Trainer


def count_bad_step(trainer: "Trainer") -> None:
    """Report a step with a non-finite loss or gradient. Raises RunError after `max_bad_steps` in a row."""
    trainer.bad_steps += 1
    warn(trainer, f"step {trainer.step}: loss or gradient is not finite; the step is skipped")
    if trainer.bad_steps >= trainer.config.max_bad_steps:
        raise RunError(
            f"{trainer.bad_steps} steps in a row (up to step {trainer.step}) had a non-finite loss or gradient; "
            "the weights are those before them. Lower lr, look at the data, or find the place with debug=true.",
            "not-finite",
        )


def after_step(trainer: "Trainer") -> None:
    """Log, call hooks, evaluate and save, as far as it is due."""
    config, last = trainer.config, trainer.step == trainer.total_steps
    if trainer.step % config.log_every_steps == 0 or last:
        log_train(trainer)
    trainer.call_hook("on_step_end")
    trainer.run.finish_saving(wait=False)
    if should_evaluate(trainer):
        run_evaluation(trainer)
    if config.save_models_every_steps and trainer.step % config.save_models_every_steps == 0 and not last:
        save_model(trainer, trainer.run.model(trainer.step))
    save_if_due(trainer)
    failpoint("step.end")


def finish(trainer: "Trainer") -> None:
    """Evaluate and save the final model, unless a signal comes."""
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
