"""What the trainer saves, models to use and checkpoints to resume from, and when.

Functions that get the trainer, as hooks do.
"""

import collections
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitrain import __version__
from minitrain.config.saved import config_yaml, written
from minitrain.config.schema import Config
from minitrain.data.loader import TokenizedDataset
from minitrain.distributed.parallel import SingleDevice
from minitrain.errors import ConfigError, RunError
from minitrain.io.paths import holds_model
from minitrain.model import save
from minitrain.model.fingerprint import model_fingerprint
from minitrain.model.weights import full_tensors

from .atomic_dir import atomic_folder
from .checkpoint import load_checkpoint
from .failpoints import failpoint

if TYPE_CHECKING:
    from minitrain.trainer import Trainer

MIN_INTERVAL = 60.0  # seconds between two checkpoints, at least
MAX_SHARE = 0.02  # of the time may go into writing them
WRITE_SPEED = 500e6  # bytes per second, assumed until one has been written
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
    state = {"precision": trainer.precision.state_dict(), "inputs": trainer.inputs, "config": trainer.run.settings()}
    trainer.run.save_checkpoint(trainer.policy, trainer.optimizer, state | progress)
    trainer.saved_progress = progress
    trainer.save_schedule.saved(time.perf_counter() - began)
    failpoint("save.end")
    trainer.call_hook("on_save")


def restore_checkpoint(trainer: "Trainer", folder: Path) -> None:
    """Set the trainer to what a checkpoint holds. Raises RunDirError when its data or base model are others."""
    state = load_checkpoint(folder, trainer.policy, trainer.optimizer, trainer.parallel)
    trainer.run.compare_inputs(folder, state["inputs"], trainer.inputs)
    trainer.precision.load_state_dict(state["precision"])
    for name in CHECKPOINT_STATE:
        setattr(trainer, name, state[name])
    if folder == trainer.run.checkpoint(trainer.step):
        trainer.saved_progress = {name: state[name] for name in CHECKPOINT_STATE}


def inputs(config: Config, examples: TokenizedDataset) -> dict[str, list[str]]:
    """Return what a checkpoint depends on and its tensors do not tell."""
    data = [cache.path.stem for cache in examples.caches] + [str(size) for size in examples.sizes]
    return {"datasets": data, "model": model_fingerprint(config.model)}


class SaveSchedule:
    """Every `save_every_steps` steps and at the end; if the option is not set, by time.

    By time, a checkpoint is due a minute after the last one, or later if writing one takes longer than 2 % of that: a
    run that is killed repeats at most a minute, or 50 times as long as a checkpoint takes.

    Attributes:
        count: Checkpoints written.
        seconds: The time that they took.
    """

    def __init__(self, every: int | None, n_bytes: int, parallel: SingleDevice):
        """
        Args:
            every: `save_every_steps`; 0: never, None: by time.
            n_bytes: The expected size of a checkpoint.
        """
        self.every, self.parallel = every, parallel
        self.cost = n_bytes / WRITE_SPEED  # seconds
        self.count, self.seconds = 0, 0.0
        self.start()

    def start(self) -> None:
        """The first step follows."""
        self.began = self.last = time.perf_counter()

    @property
    def interval(self) -> float:
        """Seconds between two checkpoints."""
        return max(MIN_INTERVAL, self.cost / MAX_SHARE)

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether a checkpoint is due after a step. All ranks call it, and get the same answer."""
        if self.every is not None:
            return self.every > 0 and (step % self.every == 0 or step == total_steps)
        waited = time.perf_counter() - self.last >= self.interval
        return self.parallel.max(int(waited)) > 0  # the clocks of ranks differ

    def saved(self, seconds: float) -> None:
        """A checkpoint took so long."""
        self.count, self.seconds, self.cost = self.count + 1, self.seconds + seconds, seconds
        self.last = time.perf_counter()

    def failed(self) -> None:
        """A checkpoint could not be written; the next attempt is an interval later."""
        self.last = time.perf_counter()

    def summary(self) -> str:
        """What checkpoints have cost."""
        share = self.seconds / max(time.perf_counter() - self.began, 1e-9)
        return f"{self.count} checkpoint{'s' * (self.count != 1)} took {self.seconds:.1f} s ({share:.1%} of the time)"


def model_card(config: Config, results: dict[str, float], n_examples: int, steps: int) -> str:
    """README.md of a saved model: what it was trained on, how, and how well it did."""
    options = written(config)
    base = _named(options["model"], "name_or_path")
    entries = options["datasets"] if isinstance(options["datasets"], list) else [options["datasets"]]
    files = "\n".join(f"- `{_named(entry, 'path')}`" for entry in entries)
    figures = "\n".join(f"| {name} | {value:.6g} |" for name, value in results.items()) or "| none | |"
    return f"""---
library_name: transformers
base_model: {json.dumps(base) if ": " in base else base}
tags: [minitrain, {config.loss["name"]}]
---

# {config.exp_name}

`{base}` trained with the loss `{config.loss["name"]}` by minitrain {__version__},
{steps} optimizer steps over {n_examples} examples.

## Data

{files}

## Results

| metric | value |
|---|---|
{figures}

## Options

```yaml
{config_yaml(config).strip()}
```
"""


def _named(section: Any, key: str) -> str:
    """Return the option that names a model or a file; a section that is one `${...}` stays as it is written."""
    return section[key] if isinstance(section, dict) else section
