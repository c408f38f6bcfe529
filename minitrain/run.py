"""The run folder: what is in it already, whether this config may go on with it, and what is written at the start."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from .engine.checkpoint import Save
from .engine.folders import checkpoints, drop_after, newest_sound, prune, sweep, verify
from .engine.parallel import SingleDevice
from .engine.tracking import LEDGER, METRICS
from .errors import RunFolderError
from .problems import related
from .saved_config import config_yaml
from .schema import Config, option_fields

INPUTS = {
    "datasets": "other data: the files, the tokenizer or their options have changed",
    "model": "another base model: the files of model.name_or_path have changed",
}


class RunFolder:
    """``output_dir/exp_name``. What writes or decides is done by rank 0 and reaches the others."""

    def __init__(self, config: Config, parallel: SingleDevice):
        """Raises RunFolderError when the folder holds a run that this config must not go on with."""
        self.config, self.parallel = config, parallel
        self.path = Path(config.output_dir) / config.exp_name
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"
        self.best = self.path / "best"
        self.models = self.path / "models"
        self.lock = None
        self.pending: Save | None = None  # a checkpoint that is being written
        parallel.first(self._refuse_changes)

    def settings(self) -> dict:
        """The config as trackers get it: what came from the environment stays unresolved."""
        return yaml.safe_load(config_yaml(self.config))

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step}"

    def model(self, step: int) -> Path:
        return self.models / f"step-{step}"

    def is_finished(self, total_steps: int, checkpoint: Path | None) -> bool:
        """Whether a run of so many steps or more has ended here by itself, which is said.

        Raises RunFolderError when a shorter one has, and left no checkpoint to go on from.
        """
        ended = self.parallel.first(self._read_ended)
        if ended is None:
            return False
        finished, planned = ended
        if planned >= total_steps:
            early = f" (stopped early, of {planned})" if finished < planned else ""
            if self.parallel.rank == 0 and not self.config.quiet:
                print(f"{self.path} is finished: {finished} steps{early}. For another run choose another exp_name.")
            return True
        if checkpoint is None:
            raise RunFolderError(
                f"{self.path} was finished at step {finished} without a checkpoint (save_every_steps=0), so it "
                "cannot go on. Choose another exp_name."
            )
        return False

    def find_checkpoint(self) -> tuple[Path | None, list[str]]:
        """The checkpoint to go on from, as `resume` says, and complaints about damaged ones.

        Raises RunFolderError when the one that was named is damaged, or none is sound.
        """
        resume = self.config.resume
        if resume == "never":
            return None, []
        if resume != "auto":
            verify(Path(resume), self.parallel)
            return Path(resume), []
        return newest_sound(self.checkpoints, self.parallel)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process can train in this folder. Raises RunFolderError when one does already."""
        self.parallel.first(self._take_lock)
        try:
            yield
        finally:
            if self.lock is not None:  # which a killed process loses too
                self.lock.close()

    def compare_inputs(self, checkpoint: Path, saved: dict[str, list], now: dict[str, list]) -> None:
        """Raises RunFolderError when a checkpoint is of other data or another base model."""
        for name, was in saved.items():
            if was != now[name] and name not in self.config.allow_changes:
                raise RunFolderError(
                    f"{checkpoint} is of a run with {INPUTS[name]}. Put them back, choose another exp_name, or go on "
                    f"with what is there now: allow_changes=[{name}]."
                )

    def start(self, step: int | None, evaluates: bool) -> None:
        """Writes config.yml, cleans up what a crash left, and drops figures and models that come anew.

        These are what came after `step`, or for None all; with `evaluates` the evaluation of `step`, too.
        """

        def kept(line: str) -> bool:
            number, kind = _step_and_kind(line)
            return step is not None and (number < step or (number == step and not (evaluates and kind == "eval")))

        def write() -> None:
            (self.path / "config.yml").write_text(config_yaml(self.config))
            prune(self.checkpoints, self.config.keep_checkpoints)
            drop_after(self.models, step or 0)
            sweep(self.models)
            sweep(self.path)
            for file in (self.path / METRICS, self.path / LEDGER):
                if file.is_file():
                    file.write_text("".join(f"{line}\n" for line in file.read_text().splitlines() if kept(line)))

        self.parallel.first(lambda: self._writing(write))

    def save_checkpoint(self, policy: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Writes a checkpoint, with `save_async` while training goes on."""
        self.finish_saving()
        folder = self.checkpoint(state["step"])
        self.pending = Save(folder, policy, optimizer, state, self.parallel, snapshot=self.config.save_async)
        if self.config.save_async:
            self.pending.start()
        else:
            self.pending.write()
            self.finish_saving()

    def finish_saving(self, wait: bool = True) -> None:
        """Commits a checkpoint that was being written; without `wait` only when all ranks have written theirs."""
        if self.pending is None or (not wait and self.parallel.max(int(self.pending.running))):
            return
        pending, self.pending = self.pending, None
        pending.commit()
        self.parallel.first(lambda: prune(self.checkpoints, self.config.keep_checkpoints))

    def prune_models(self) -> None:
        """Removes older models than `keep_models`; rank 0 calls it."""
        prune(self.models, self.config.keep_models)

    def finish(self, step: int, total_steps: int) -> None:
        """Notes that the run has ended by itself."""
        ended = json.dumps({"finished_step": step, "total_steps": total_steps})
        self.parallel.first(lambda: self._writing(lambda: (self.path / "run.json").write_text(ended)))

    def _read_ended(self) -> tuple[int, int] | None:
        try:
            ended = json.loads((self.path / "run.json").read_text())
            return ended["finished_step"], ended["total_steps"]
        except (OSError, ValueError, KeyError):
            return None

    def _take_lock(self) -> None:
        self._writing(lambda: self.path.mkdir(parents=True, exist_ok=True))
        self.lock = self._writing(lambda: open(self.path / ".lock", "a+"))
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.seek(0)
            raise RunFolderError(
                f"{self.path}: another process trains in this folder ({self.lock.read().strip()}); "
                "wait for it, or choose another exp_name."
            ) from None
        self._writing(self._sign_lock)

    def _sign_lock(self) -> None:
        self.lock.truncate(0)
        self.lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.lock.flush()

    def _writing(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError as error:
            raise RunFolderError(f"{self.path}: cannot be written: {error.strerror}. Set output_dir.") from None

    def _refuse_changes(self) -> None:
        """Raises RunFolderError for a folder with a run that `resume` forbids, or that had other options."""
        if not (self.path / "config.yml").exists():
            return
        if self.config.resume == "never":
            raise RunFolderError(f"{self.path} holds a run already: choose another exp_name, or resume=auto.")
        trained = checkpoints(self.checkpoints) or checkpoints(self.models) or self._read_ended()
        if self.config.resume != "auto" or not trained:
            return
        try:
            saved = yaml.safe_load((self.path / "config.yml").read_text())
        except (OSError, yaml.YAMLError):
            return
        changes = dict(_changes(saved if isinstance(saved, dict) else {}, self.settings(), self.config))
        allowed = self.config.allow_changes
        refused = {key: told for key, told in changes.items() if not any(related(key, name) for name in allowed)}
        if refused:
            told = "; ".join(f"{key}: {change}" for key, change in refused.items())
            raise RunFolderError(
                f"{self.path} holds a run with other options ({told}). Choose another exp_name, take the options back, "
                f"or go on with them: allow_changes=[{','.join(refused)}]."
            )


def _changes(saved: Any, new: Any, schema: Any, path: str = ""):
    """(key, ``old -> new``) of each option that changes what is computed."""
    for f in option_fields(schema):
        if f.metadata["free"]:
            continue
        old, now, value = saved.get(f.name), new.get(f.name), getattr(schema, f.name)
        if is_dataclass(value) and isinstance(old, dict):
            yield from _changes(old, now, value, f"{path}{f.name}.")
        elif old != now:
            yield f"{path}{f.name}", f"{_short(old)} -> {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _step_and_kind(line: str) -> tuple[int, str | None]:
    try:
        found = json.loads(line)
        return found["step"], found.get("kind")
    except (ValueError, KeyError):
        return 1 << 62, None  # a line cut off by a crash
