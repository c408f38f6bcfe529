"""What the trainer saves, models and checkpoints, and when.

Functions that take `trainer` receive it like hooks.
"""

import collections
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from minitrain import __version__
from minitrain.config.saved import config_yaml, saved_options
from minitrain.config.schema import Config
from minitrain.data.loader import TokenizedDataset
from minitrain.distributed.parallel import SingleDevice
from minitrain.errors import ConfigError, RunError
from minitrain.io.paths import holds_model
from minitrain.losses import Loss
from minitrain.model import save
from minitrain.model.fingerprint import model_fingerprint
from minitrain.model.policy import Policy
from minitrain.model.weights import full_tensors

from .atomic_dir import atomic_folder
from .aux_models import moving_reference
from .checkpoint import DATA, load_checkpoint
from .failpoints import failpoint
from .metric_logger import METRICS
from .metrics_log import parse_line

if TYPE_CHECKING:
    from minitrain.trainer import Trainer

MIN_INTERVAL = 60.0  # seconds between two checkpoints, at least
MAX_SHARE = 0.02  # of the run time, spent on writing checkpoints
WRITE_SPEED = 500e6  # bytes per second, assumed until the first checkpoint is written
# Attributes of the trainer that a checkpoint holds. They are keys of state.json.
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
    """Write the current model with its tokenizer and model card. All ranks must call it."""
    results = {f"eval {k}": v for k, v in trainer.eval_metrics.items()}
    results |= {f"train {k}": v for k, v in trainer.train_metrics.items() if k == "loss"}

    def card() -> str:
        before = {f"eval {k}": v for k, v in first_evaluation(trainer.run.path / METRICS).items()}
        n_examples, matrices = len(trainer.train_loader.examples), trainer.policy.model.matrices
        return model_card(trainer.config, results, before, n_examples, trainer.step, matrices)

    policy, dtype, parallel = trainer.policy, trainer.precision.dtype, trainer.parallel
    parallel.set_status(f"saving {folder}")
    failpoint("model.save")
    rest = trainer.tokenizer, dtype, parallel, card, trainer.run.prune_models
    write_model(folder, policy, trainer.loss, *rest)
    trainer.call_hook("on_save")


def write_model(
    folder: Path,
    policy: Policy,
    loss: Loss,
    tokenizer: Any,
    dtype: torch.dtype,
    parallel: SingleDevice,
    card: Callable[[], str],
    then: Callable[[], None] = lambda: None,
) -> None:
    """Write a model with its tokenizer. All ranks must call it.

    Args:
        card: Returns the text of README.md on rank 0.
        then: Rank 0 calls it after writing.
    """
    tensors = full_tensors(policy.model, parallel.full_tensor)
    head_parameters = policy.value_head.named_parameters() if policy.value_head is not None else ()
    value_head = {name: parallel.full_tensor(parameter.detach()) for name, parameter in head_parameters}

    def write() -> None:
        with atomic_folder(folder) as temporary:
            save.save_model(policy.model, tokenizer, temporary, dtype, tensors, value_head)
            (temporary / "README.md").write_text(card(), encoding="utf-8")
            for name, content in loss.model_files(policy.model.config.get_text_config().hidden_size).items():
                (temporary / name).parent.mkdir(exist_ok=True)
                (temporary / name).write_text(json.dumps(content, indent=1))
        then()

    # Gathering shards takes all ranks.
    parallel.run_on_rank0(write, meanwhile=lambda: collections.deque(tensors, maxlen=0))


def check_target(path: Path) -> None:
    """Raise ConfigError if the path holds anything other than a saved model."""
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not holds_model(path)):
        raise ConfigError(f"{path}: exists and is not a saved model. Choose another folder.", "already-exists")


def save_if_due(trainer: "Trainer") -> None:
    """Write a checkpoint if one is due. All ranks must call it.

    Training continues after a failure if `save_every_steps` is not set, because the user did not request checkpoints.
    """
    if not trainer.save_schedule.is_due(trainer.step, trainer.total_steps):
        return
    try:
        save_checkpoint(trainer)
    except RunError as error:  # the same on all ranks
        if trainer.config.save_every_steps is not None:
            raise
        trainer.save_schedule.failed()
        message = f"warning: {error.message} Training continues without this checkpoint. [{error.code}]"
        trainer.logger.warning(message)


def save_checkpoint(trainer: "Trainer") -> None:
    """Write a checkpoint of this step, unless this state is already saved. All ranks must call it."""
    began = time.perf_counter()
    trainer.parallel.set_status(f"the checkpoint of step {trainer.step}")
    progress = {name: getattr(trainer, name) for name in CHECKPOINT_STATE}
    if trainer.parallel.run_on_rank0(lambda: progress == trainer.saved_progress):
        return
    state = {
        "precision": trainer.precision.state_dict(),
        "inputs": trainer.input_fingerprints,
        "config": trainer.run.settings(),
    }
    state["loader"], data = trainer.train_loader.state(trainer.consumed)
    reference = moving_reference(trainer.loss, trainer.models)
    trainer.run.save_checkpoint(trainer.policy, trainer.optimizer, state | progress, data, reference)
    trainer.saved_progress = progress
    seconds = time.perf_counter() - began
    trainer.save_schedule.saved(seconds)
    trainer.time_limit.leave_out(seconds)
    failpoint("save.end")
    trainer.call_hook("on_save")


def restore_checkpoint(trainer: "Trainer", folder: Path) -> None:
    """Restore the trainer from a checkpoint. Raise RunDirError if its data or base model differ."""
    reference = moving_reference(trainer.loss, trainer.models)
    state = load_checkpoint(folder, trainer.policy, trainer.optimizer, trainer.parallel, reference)
    trainer.run.check_fingerprints(folder, state["inputs"], trainer.input_fingerprints)
    trainer.precision.load_state_dict(state["precision"])
    for name in CHECKPOINT_STATE:
        setattr(trainer, name, state[name])
    data = folder / DATA
    trainer.train_loader.restore(state.get("loader", {}), load_file(data) if data.exists() else {})
    if folder == trainer.run.checkpoint(trainer.step):
        trainer.saved_progress = {name: state[name] for name in CHECKPOINT_STATE}


def input_fingerprints(config: Config, examples: TokenizedDataset) -> dict[str, list[str]]:
    """Return fingerprints of the training data and the base model, which a resumed run must share."""
    data = [cache.path.stem for cache in examples.caches] + [str(size) for size in examples.sizes]
    return {"datasets": data, "model": model_fingerprint(config.model)}


class SaveSchedule:
    """Decides when a checkpoint is due: every `save_every_steps` steps and at the end or, without the option, by time.

    By time, the interval is a minute, or 50 times the duration of a write if that is longer. A killed run repeats at
    most one interval.

    Attributes:
        count: Number of checkpoints written.
        seconds: Total time of writing them.
    """

    def __init__(self, every: int | None, n_bytes: int, parallel: SingleDevice):
        """
        Args:
            every: `save_every_steps`. 0 is never, None is by time.
            n_bytes: Expected size of a checkpoint.
        """
        self.every, self.parallel = every, parallel
        self.cost = n_bytes / WRITE_SPEED  # seconds
        self.count, self.seconds = 0, 0.0
        self.start()

    def start(self) -> None:
        """Start the clock, just before the first step."""
        self.began = self.last = time.perf_counter()

    @property
    def interval(self) -> float:
        """Seconds between two checkpoints."""
        return max(MIN_INTERVAL, self.cost / MAX_SHARE)

    def is_due(self, step: int, total_steps: int) -> bool:
        """Return whether a checkpoint is due after this step. All ranks must call it, and get the same answer."""
        if self.every is not None:
            return self.every > 0 and (step % self.every == 0 or step == total_steps)
        waited = time.perf_counter() - self.last >= self.interval
        return self.parallel.max(int(waited)) > 0  # the clocks of ranks differ

    def saved(self, seconds: float) -> None:
        """Record a checkpoint that took this many seconds."""
        self.count, self.seconds, self.cost = self.count + 1, self.seconds + seconds, seconds
        self.last = time.perf_counter()

    def failed(self) -> None:
        """Record a failed checkpoint. The next attempt is one interval later."""
        self.last = time.perf_counter()

    def summary(self) -> str:
        """Return one line about the cost of checkpoints."""
        share = self.seconds / max(time.perf_counter() - self.began, 1e-9)
        return f"{self.count} checkpoint{'s' * (self.count != 1)} took {self.seconds:.1f} s ({share:.1%} of the time)"


def first_evaluation(log: Path) -> dict[str, Any]:
    """Return the metrics of the evaluation before the first step; {} if the log does not have it."""
    with contextlib.suppress(OSError, ValueError), open(log, "rb") as lines:
        for row in map(parse_line, lines):
            if row["step"] > 0:
                break
            if row.get("kind") == "eval":
                return row
    return {}


def model_card(
    config: Config, results: dict[str, float], before: dict[str, Any], n_examples: int, steps: int, matrices: str
) -> str:
    """Return README.md of a saved model: its data, results, those of the base before training, and options."""
    options = saved_options(config)
    base = _named(options["model"], "name_or_path")
    entries = options["datasets"] if isinstance(options["datasets"], list) else [options["datasets"]]
    files = "\n".join(f"- `{_named(entry, 'path')}`" for entry in entries)
    rows = {name: (before.get(name, ""), value) for name, value in results.items()} or {"none": ("", "")}
    metrics = "\n".join(f"| {name} | {_number(first)} | {_number(last)} |" for name, (first, last) in rows.items())
    return f"""---
library_name: transformers
base_model: {json.dumps(base) if ": " in base else base}
tags: [minitrain, {config.loss["name"]}]
---

# {config.exp_name}

`{base}` trained with the loss `{config.loss["name"]}` by minitrain {__version__},
{steps} optimizer steps over {n_examples} examples. Of the weights in its matrices: {matrices}.

## Data

{files}

## Results

| metric | before training | after |
|---|---|---|
{metrics}

## Options

```yaml
{config_yaml(config).strip()}
```
"""


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def _named(section: Any, key: str) -> str:
    """Return the name of a model or file from its section. A section that is one `${...}` is returned as it is."""
    return section[key] if isinstance(section, dict) else section
