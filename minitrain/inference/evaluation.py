"""All metrics of an evaluation: those of the loss, and how many generated answers are right."""

import dataclasses
from typing import TYPE_CHECKING, Any

from minitrain.config.schema import DatasetConfig
from minitrain.data.loader import MicrobatchLoader, load_data
from minitrain.data.rows import rows_object
from minitrain.errors import ConfigError
from minitrain.losses import add_features
from minitrain.training.aux_models import reference_kind
from minitrain.training.setup import make_loader
from minitrain.training.step import evaluate

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


def load_rows(trainer: "Trainer", rows: Any) -> MicrobatchLoader:
    """Return the loader of rows to evaluate on. Raises ConfigError or DataError. All ranks call it."""
    config, loss, parallel = trainer.config, trainer.loss, trainer.parallel
    if "reference" in loss.requires and reference_kind(loss, config) == "precomputed":
        raise ConfigError("dataset: has no log-probabilities of the reference. Set loss.reference=model.", "conflict")
    given = rows_object(rows, "dataset")
    chosen = dataclasses.replace(config, datasets=[DatasetConfig(given.text)], eval_datasets=[], validation_split=0)
    with parallel.local_rank0_first():
        data = load_data(chosen, trainer.template, loss.example_type)
        add_features(loss, trainer.train_loader.examples.caches, data.train.caches)
    parallel.check_same(dataset=[cache.key for cache in data.train.caches])
    return make_loader(data.train, config, trainer.tokenizer, trainer.policy, parallel.rank, parallel.world_size)
