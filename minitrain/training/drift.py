"""What an evaluation computes besides the loss: the distance from the start of the training, and what is forgotten."""

import functools
from typing import TYPE_CHECKING

from minitrain.config.schema import Config
from minitrain.data.loader import MicrobatchLoader
from minitrain.distributed.parallel import SingleDevice
from minitrain.losses import Loss, Models, create_loss
from minitrain.model.adapter_config import has_adapter
from minitrain.model.load import build_frozen

from .aux_models import FrozenModel, InitialPolicySnapshot, Load, load_reference, sync_steps
from .step import Precision, evaluate

if TYPE_CHECKING:
    from minitrain.trainer import Trainer

KL, RETENTION = "kl_to_start", "retention/"


def add_start(
    models: Models,
    loss: Loss,
    config: Config,
    tokenizer,
    parallel: SingleDevice,
    precision: Precision,
    load: Load = build_frozen,
) -> Models:
    """Return the models with the policy before training, if `eval_kl_to_start` is set. Call it before the first step.

    Args:
        load: Builds a frozen model.
    """
    if not config.eval_kl_to_start:
        return models
    if isinstance(models.reference, (InitialPolicySnapshot, FrozenModel)) and not sync_steps(loss):
        return models._replace(start=models.reference)
    if has_adapter(config):
        return models._replace(start=InitialPolicySnapshot(models.policy, parallel))
    return models._replace(start=load_reference(config, models.policy, tokenizer, parallel, precision, load))


def drift_metrics(trainer: "Trainer", loader: MicrobatchLoader) -> dict[str, float]:
    """Return the metrics of `eval_kl_to_start` and `retention_datasets`; {} after a signal. All ranks must call it.

    Args:
        loader: The evaluation data. Those of a training are evaluated together with the retention data.
    """
    models, has_start = trainer.models, trainer.models.start is not None
    run = functools.partial(
        evaluate, parallel=trainer.parallel, precision=trainer.precision, stop=trainer.is_interrupted
    )
    found: dict[str, float] = {}
    if has_start and not trainer.loss.online:
        found[KL] = run(kl_loss(), loader.eval_batches, against_start(models)).get("kl")
    retention = trainer.retention_loader if loader is trainer.eval_loader else None
    if retention is not None:
        means = run(create_loss("sft"), retention.eval_batches, models)
        found |= {f"{RETENTION}{name}": means.get(name) for name in ("loss", "perplexity")}
        if has_start:
            found[f"{RETENTION}{KL}"] = run(kl_loss(), retention.eval_batches, against_start(models)).get("kl")
    return {} if None in found.values() else found


def kl_loss() -> Loss:
    """Return the loss whose metric `kl` is KL(policy || teacher), the mean over the targets, at temperature 1."""
    return create_loss("kd", teacher="start", divergence="reverse_kl", temperature=1.0, alpha=1.0, beta=0.0)


def against_start(models: Models) -> Models:
    """Return the models for `kl_loss`: the teacher is the policy before training."""
    return Models(models.policy, teacher=models.start)


def drift_names(config: Config, online: bool) -> list[str]:
    """Return the names of the metrics that `drift_metrics` adds."""
    has_start, retention = config.eval_kl_to_start, bool(config.retention_datasets)
    names = [KL] * (has_start and not online)
    return names + [f"{RETENTION}{name}" for name in ("loss", "perplexity", *[KL] * has_start)] * retention
