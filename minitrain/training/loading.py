"""Load the data and models of a trainer."""

import functools
from typing import TYPE_CHECKING

import torch

from minitrain.config.saved import to_plain
from minitrain.config.schema import LISTS, Config
from minitrain.data.loader import Data
from minitrain.distributed.parallel import SingleDevice
from minitrain.model.load import DTYPES
from minitrain.model.multimodal import describe_text_part
from minitrain.model.router import describe_aux_loss
from minitrain.model.vocabulary import describe_new_tokens

from .after_step import warn
from .aux_models import build_aux_models
from .drift import add_start
from .failpoints import failpoint
from .learning_rate import batch_hints, describe_optimizer
from .optim import build_optimizer
from .run_dir import RunDir
from .saving import input_fingerprints
from .setup import prepare, prepare_policy
from .step import Precision

if TYPE_CHECKING:
    from minitrain.trainer import Trainer

# Options that may differ between ranks: paths, whose content `check_same_inputs` compares, and output.
PER_MACHINE = ("output_dir", "cache_dir", "model", *LISTS, "quiet", "wandb", "swanlab", "trackio", "mlflow")


def load_parts(trainer: "Trainer") -> None:
    """Load the data, the models and the optimizer of a trainer. An error on one rank ends all ranks."""
    config = trainer.config
    check_same_options(config, trainer.parallel)
    trainer.run = RunDir(config, trainer.parallel)
    trainer.precision = Precision(DTYPES[config.model.policy_dtype], trainer.device)

    torch.manual_seed(config.seed)
    torch.autograd.set_detect_anomaly(config.debug)
    run = prepare(config, trainer.loss, trainer.parallel)
    trainer.input_fingerprints = input_fingerprints(config, run.data.train)
    check_same_inputs(config, run.data, trainer.input_fingerprints["model"], trainer.parallel)
    trainer.template, trainer.tokenizer = run.template, run.template.tokenizer
    new = describe_new_tokens(run.policy.model, trainer.tokenizer)
    trainer.notes = [*run.data.summary, *([f"new tokens: {new}"] if new else [])]
    trainer.notes.append(f"matrices: {run.policy.model.matrices}")
    if aux_loss := describe_aux_loss(run.policy.routing):
        trainer.notes.append(f"router: {aux_loss}")
    if text_part := describe_text_part(run.policy.model):
        trainer.notes.append(f"model: {text_part}")
    trainer.warnings = run.data.warnings
    trainer.train_loader, trainer.eval_loader, trainer.warmup = run.train_loader, run.eval_loader, run.warmup
    trainer.retention_loader = run.retention_loader
    trainer.total_steps = trainer.train_loader.total_steps
    trainer.policy = prepare_policy(
        run.policy,
        run.weights,
        config,
        trainer.parallel,
        trainer.precision,
        trainer.loss.dropout,
        functools.partial(warn, trainer),
    )
    if run.packing_note:
        trainer.notes.append(f"packing: {run.packing_note}")
    trainer.notes.append(f"optimizer: {describe_optimizer(config, trainer.loss, trainer.warmup)}")
    trainer.notes += [f"hint: {hint}" for hint in batch_hints(config, run.policy, trainer.loss, trainer.total_steps)]
    failpoint("load.weights")
    rest = trainer.tokenizer, trainer.parallel, trainer.precision
    models = build_aux_models(trainer.loss, config, trainer.policy, *rest, run.loaders)
    trainer.models = add_start(models, trainer.loss, config, *rest)
    trainer.parameters = [p for p in trainer.policy.parameters() if p.requires_grad]
    trainer.optimizer = build_optimizer(trainer.policy, config)
    torch.manual_seed(config.seed + trainer.parallel.rank)  # dropout differs by rank


def check_same_options(config: Config, parallel: SingleDevice) -> None:
    """Raise ConfigError on all ranks if an option differs between them, as `${oc.env:...}` can."""
    options = {name: value for name, value in to_plain(config).items() if name not in PER_MACHINE}
    parallel.check_same(**options, policy_dtype=config.model.policy_dtype)


def check_same_inputs(config: Config, data: Data, fingerprint: list[str], parallel: SingleDevice) -> None:
    """Raise ConfigError on all ranks if their data or the fingerprints of their base models differ."""
    keys = {"datasets": [cache.key for cache in data.train.caches]}
    if config.eval_datasets and data.eval:
        keys["eval_datasets"] = [cache.key for cache in data.eval.caches]
    if data.retention:
        keys["retention_datasets"] = [cache.key for cache in data.retention.caches]
    parallel.check_same(**keys, model=fingerprint)
