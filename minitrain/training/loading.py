"""Everything that a trainer loads before its first step."""

from typing import TYPE_CHECKING

import torch

from minitrain.model.load import DTYPES, build_policy
from minitrain.model.save import check_saving, set_end_tokens
from minitrain.model.vocabulary import describe_new_tokens

from .agreement import check_same_inputs, check_same_options
from .aux_models import build_aux_models
from .failpoints import failpoint
from .optim import build_optimizer, warmup_steps
from .run_dir import RunDir
from .setup import make_loader, prepare_policy, read_data
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
    with trainer.parallel.local_rank0_first():  # the first process of a machine tokenises and downloads
        trainer.template, data = read_data(config, trainer.loss)
        trainer.tokenizer = trainer.template.tokenizer
        ends = {"outputs": trainer.loss.head_labels, "value_head": "values" in trainer.loss.requires}
        policy, weights = build_policy(config, trainer.tokenizer, trainer.device, trainer.parallel.loads_shards, **ends)
        failpoint("load.policy")
    check_same_inputs(config, data, trainer.parallel)
    new = describe_new_tokens(policy.model, trainer.tokenizer)
    trainer.notes = [*data.notes, *([f"new tokens: {new}"] if new else [])]
    trainer.warnings = data.warnings
    share = {"rank": trainer.parallel.rank, "world_size": trainer.parallel.world_size}
    trainer.train_loader = make_loader(data.train, config, trainer.tokenizer, policy, **share)
    trainer.eval_loader = make_loader(data.eval, config, trainer.tokenizer, policy, **share) if data.eval else None
    trainer.total_steps = trainer.train_loader.total_steps
    trainer.warmup = warmup_steps(config, trainer.total_steps)
    loaders = list(filter(None, (trainer.train_loader, trainer.eval_loader)))
    trainer.policy = prepare_policy(policy, weights, config, trainer.parallel, trainer.precision, trainer.loss.dropout)
    failpoint("load.weights")
    trainer.models = build_aux_models(
        trainer.loss, config, trainer.policy, trainer.tokenizer, trainer.parallel, trainer.precision, loaders
    )
    trainer.parameters = [p for p in trainer.policy.parameters() if p.requires_grad]
    trainer.optimizer = build_optimizer(trainer.policy, config)
    set_end_tokens(policy.model, trainer.template.end_ids())
    check_saving(policy.model, trainer.tokenizer)
    torch.manual_seed(config.seed + trainer.parallel.rank)  # dropout differs by rank
