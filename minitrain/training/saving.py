"""What the trainer saves: models to use, and checkpoints to resume from.

Functions that get the trainer, as hooks do.
"""

import collections
import time
from pathlib import Path
from typing import TYPE_CHECKING

from minitrain.config.schema import Config
from minitrain.data.loader import TokenizedDataset
from minitrain.errors import ConfigError, RunError
from minitrain.io.paths import holds_model
from minitrain.model import save
from minitrain.model.fingerprint import model_fingerprint
from minitrain.model.weights import full_tensors

from .atomic_dir import atomic_folder
from .checkpoint import load_checkpoint
from .failpoints import failpoint
from .model_card import model_card

if TYPE_CHECKING:
    from minitrain.trainer import Trainer

# What a checkpoint holds besides tensors: attributes of the trainer.
CHECKPOINT_STATE = (
    "step",
    "updates",
    "consumed",
    "bad_steps",
    "best",
    "evals_without_improvement",
    "eval_metrics",
    "evaluated_step",
)


def save_model(trainer: "Trainer", folder: Path) -> None:
    """Write the model as it is now, with its tokenizer and model card. All ranks call it."""
    results = {f"eval {k}": v for k, v in trainer.eval_metrics.items()}
    results |= {f"train {k}": v for k, v in trainer.train_metrics.items() if k == "loss"}
    card = model_card(trainer.config, results, len(trainer.train_loader.examples), trainer.step)
    model, parallel = trainer.generator.model, trainer.parallel
    tensors = full_tensors(model, parallel.full_tensor)
    head = trainer.policy.value_head
    head_parameters = head.named_parameters() if head is not None else ()
    value_head = {name: parallel.full_tensor(parameter.detach()) for name, parameter in head_parameters}

    def write() -> None:
        with atomic_folder(folder) as temporary:
            save.save_model(model, trainer.tokenizer, temporary, trainer.precision.dtype, tensors, value_head)
            (temporary / "README.md").write_text(card)
        trainer.run.prune_models()

    parallel.set_status(f"saving {folder}")
    failpoint("model.save")
    parallel.run_on_rank0(write, meanwhile=lambda: collections.deque(tensors, maxlen=0))  # joining takes all ranks
    trainer.call_hook("on_save")


def check_target(path: Path) -> None:
    """Raise ConfigError for a path that holds something else than a saved model."""
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not holds_model(path)):
        raise ConfigError(f"{path}: exists and is not a saved model. Choose another folder.", "already-exists")


def save_if_due(trainer: "Trainer") -> None:
    """Write a checkpoint if the schedule says so. All ranks call it.

    One that the user did not ask for, and that cannot be written, does not end the training.
    """
    if not trainer.save_schedule.is_due(trainer.step, trainer.total_steps):
        return
    try:
        save_checkpoint(trainer)
    except RunError as error:  # the same on all ranks
        if trainer.config.save_every_steps is not None:
            raise
        trainer.save_schedule.failed()
        told = f"warning: {error.message} Training continues without this checkpoint. [{error.code}]"
        trainer.logger.warning(told)


def save_checkpoint(trainer: "Trainer") -> None:
    """Write a checkpoint of this step, unless one of exactly this state is there. All ranks call it."""
    began = time.perf_counter()
    trainer.parallel.set_status(f"the checkpoint of step {trainer.step}")
    progress = {name: getattr(trainer, name) for name in CHECKPOINT_STATE}
    if trainer.parallel.run_on_rank0(lambda: progress == trainer.saved_progress):
        return
    depends_on = inputs(trainer.config, trainer.train_loader.examples)
    state = {"precision": trainer.precision.state_dict(), "inputs": depends_on, "config": trainer.run.settings()}
    trainer.run.save_checkpoint(trainer.policy, trainer.optimizer, state | progress)
    trainer.saved_progress = progress
    trainer.save_schedule.saved(time.perf_counter() - began)
    failpoint("save.end")
    trainer.call_hook("on_save")


def restore_checkpoint(trainer: "Trainer", folder: Path) -> None:
    """Set the trainer to what a checkpoint holds. Raises RunFolderError when its data or base model are others."""
    state = load_checkpoint(folder, trainer.policy, trainer.optimizer, trainer.parallel)
    trainer.run.compare_inputs(folder, state["inputs"], inputs(trainer.config, trainer.train_loader.examples))
    trainer.precision.load_state_dict(state["precision"])
    for name in CHECKPOINT_STATE:
        setattr(trainer, name, state[name])
    if folder == trainer.run.checkpoint(trainer.step):
        trainer.saved_progress = {name: state[name] for name in CHECKPOINT_STATE}


def inputs(config: Config, examples: TokenizedDataset) -> dict[str, list[str]]:
    """Return what a checkpoint depends on and its tensors do not tell."""
    data = [cache.path.stem for cache in examples.caches] + [str(size) for size in examples.sizes]
    return {"datasets": data, "model": model_fingerprint(config.model)}
