"""Everything that a trainer loads before its first step."""

from typing import TYPE_CHECKING

import torch

from minitrain.model.load import DTYPES
from minitrain.model.vocabulary import describe_new_tokens

from .agreement import check_same_inputs, check_same_options
from .aux_models import build_aux_models
from .failpoints import failpoint
from .optim import build_optimizer
from .run_dir import RunDir
from .saving import inputs
from .setup import prepare, prepare_policy
from .step import Precision

if TYPE_CHECKING:
    from minitrain.trainer import Trainer


def load_parts(trainer: "Trainer") -> None:
    """Read the data and the model, and try what training needs. An error of one rank ends them all."""
    config = trainer.config
    check_same_options(config, trainer.parallel)
    trainer.run = RunDir(config, trainer.parallel)
    trainer.precision = Precision(DTYPES[config.model.policy_dtype], trainer.device)

    torch.manual_seed(config.seed)
    torch.autograd.set_detect_anomaly(config.debug)
    run = prepare(config, trainer.loss, trainer.parallel)
    trainer.inputs = inputs(config, run.data.train)
    check_same_inputs(config, run.data, trainer.inputs["model"], trainer.parallel)
    trainer.template, trainer.tokenizer = run.template, run.template.tokenizer
    new = describe_new_tokens(run.policy.model, trainer.tokenizer)
    trainer.notes = [*run.data.notes, *([f"new tokens: {new}"] if new else [])]
    trainer.warnings = run.data.warnings
    trainer.train_loader, trainer.eval_loader, trainer.warmup = run.train_loader, run.eval_loader, run.warmup
    trainer.total_steps = trainer.train_loader.total_steps
    trainer.policy = prepare_policy(
        run.policy, run.weights, config, trainer.parallel, trainer.precision, trainer.loss.dropout
    )
    failpoint("load.weights")
    trainer.models = build_aux_models(
        trainer.loss, config, trainer.policy, trainer.tokenizer, trainer.parallel, trainer.precision, run.loaders
    )
    trainer.parameters = [p for p in trainer.policy.parameters() if p.requires_grad]
    trainer.optimizer = build_optimizer(trainer.policy, config)
    torch.manual_seed(config.seed + trainer.parallel.rank)  # dropout differs by rank
