"""All metrics of an evaluation: those of the loss, and how many generated answers are right."""

from typing import TYPE_CHECKING

from minitrain.data.loader import MicrobatchLoader
from minitrain.training.metrics import evaluate

from .exact_match import exact_match

if TYPE_CHECKING:
    from minitrain.trainer import Trainer


def evaluate_all(trainer: "Trainer", loader: MicrobatchLoader) -> dict[str, float]:
    """Return the metrics on the examples of a loader; {} when a signal came. All ranks call it."""
    config, models, parallel = trainer.config, trainer.models, trainer.parallel
    stop = trainer.is_interrupted
    metrics = evaluate(trainer.loss, loader.eval_batches, models, parallel, trainer.precision, stop)
    if metrics and config.eval_generate.n_examples:
        say = trainer.logger.info if trainer.logger else lambda line: None
        with trainer.precision.autocast():
            metrics["exact_match"] = exact_match(
                trainer.generator, loader.examples, config.eval_generate, config.eval_batch_size, say, not config.quiet
            )
    return metrics
