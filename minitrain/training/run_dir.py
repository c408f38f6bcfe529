"""The run directory: what is in it already, whether this config may go on with it, and what is written at the start."""

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from minitrain.config.aliases import with_own_names
from minitrain.config.issues import keys_overlap
from minitrain.config.saved import config_yaml, without_passwords
from minitrain.config.schema import Config, option_fields
from minitrain.distributed.parallel import SingleDevice
from minitrain.errors import RunDirError, write_error_code
from minitrain.losses import loss_options

from .atomic_dir import (
    checkpoints,
    drop_after,
    holds_checkpoint,
    latest_valid,
    prune,
    read_manifest,
    recover,
    replace_file,
    step_of,
    sweep,
    verify,
)
from .checkpoint import Save
from .metric_logger import LEDGER, METRICS, RUN_ID, Logged
from .metrics_log import (
    KINDS,
    UNREADABLE,
    damaged_lines_message,
    last_step,
    last_steps,
    read_end,
    read_settings,
    truncate_log,
)

LOGS = (METRICS, LEDGER)
FILES = (*LOGS, RUN_ID)
WRITTEN_BY_STEPS = (*FILES, "tensorboard", "models", "best", "final")  # what a restart from step 0 would replace
INPUTS = {
    "datasets": "other data: the files, the tokenizer or their options have changed",
    "model": "another base model: the files of model.name_or_path have changed",
}


class RunDir:
    """``output_dir/exp_name``. What writes or decides is done by rank 0 and reaches the others."""

    def __init__(self, config: Config, parallel: SingleDevice):
        """Raises RunDirError for a folder that cannot be written, or with a run that must not be continued."""
        self.config, self.parallel = config, parallel
        self.path = Path(config.output_dir) / config.exp_name
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"
        self.best = self.path / "best"
        self.models = self.path / "models"
        self.lock = None
        self.messages: list[str] = []  # what was damaged or interrupted in this folder, for the console
        self.pending: Save | None = None  # a checkpoint that is being written
        parallel.run_on_rank0(lambda: self._writing(self._try_writing))
        parallel.run_on_rank0(self._refuse_changes)

    def settings(self) -> dict:
        """The config as trackers get it: what came from the environment stays unresolved."""
        return yaml.safe_load(config_yaml(self.config))

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step}"

    def model(self, step: int) -> Path:
        return self.models / f"step-{step}"

    def finished(self, total_steps: int) -> str | None:
        """Return what to say if a run of so many steps or more has ended here by itself, else None.

        Raises RunDirError when a shorter one has, and left no checkpoint to go on from, and when `resume` names a
        folder that is not a checkpoint.
        """
        ended = self.parallel.run_on_rank0(lambda: read_end(self.path))
        if ended is None:
            return None
        finished, planned = ended
        if planned >= total_steps:
            if self.config.resume not in ("auto", "never"):  # a folder that was named is never ignored
                self.parallel.run_on_rank0(lambda: read_manifest(Path(self.config.resume)))
            early = f" (stopped early, of {planned})" if finished < planned else ""
            return f"{self.path} is finished: {finished} steps{early}. For another run choose another exp_name."
        if self.config.resume == "auto" and not self.parallel.run_on_rank0(lambda: holds_checkpoint(self.checkpoints)):
            raise RunDirError(
                f"{self.path} was finished at step {finished} and holds no checkpoint (see save_every_steps), so it "
                "cannot be continued. Choose another exp_name.",
                "other-run",
            )
        return None

    def find_checkpoint(self) -> Path | None:
        """The checkpoint to go on from, as `resume` says; damaged ones are reported in `messages`.

        Raises RunDirError when the one that was named is damaged, or none is sound.
        """
        resume = self.config.resume
        if resume == "never":
            return None
        if resume != "auto":
            verify(Path(resume), self.parallel)
            return Path(resume)
        found, complaints = latest_valid(self.checkpoints, self.parallel)
        self.messages += complaints
        return found

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process can train in this folder, and what a kill interrupted has been completed.

        Raises RunDirError when another process trains in it.
        """
        self.parallel.run_on_rank0(self._take_lock)
        self.parallel.run_on_rank0(lambda: self._writing(self._recover))
        try:
            yield
        finally:
            if self.lock is not None:  # which a killed process loses too
                self.lock.close()

    def compare_inputs(self, checkpoint: Path, saved: dict[str, list], now: dict[str, list]) -> None:
        """Raises RunDirError when a checkpoint is of other data or another base model."""
        for name, was in saved.items():
            if was != now[name] and name not in self.config.allow_changes:
                raise RunDirError(
                    f"{checkpoint} is of a run with {INPUTS[name]}. Put them back, choose another exp_name, or go on "
                    f"with what is there now: allow_changes=[{name}].",
                    "other-run",
                )

    def start(self, step: int | None, evaluates: bool) -> Logged | None:
        """Write config.yml, remove what a kill left, and the logs and models that are computed again.

        Args:
            step: That of the checkpoint; None without one. Later logs and models are computed again.
            evaluates: Whether the evaluation of `step` is, too.

        Returns:
            What has been logged, for trackers; None without a checkpoint. Only rank 0 knows.
        """

        rows, steps = [], {}

        def is_kept(row: dict) -> bool:
            if row["step"] != step or (evaluates and row.get("kind") == "eval"):
                return row["step"] < step
            if row.get("kind") in KINDS:
                rows.append(row)
            return True

        def write() -> None:
            for folder in (self.checkpoints, self.models, self.path):
                sweep(folder)
            self._set_aside_former_attempt(step)
            replace_file(self.path / "config.yml", [config_yaml(self.config).encode()])
            prune(self.checkpoints, self.config.keep_checkpoints, step)
            drop_after(self.models, step or 0)
            if step is None:
                return
            if (self.path / METRICS).is_file() and (self.path / RUN_ID).is_file():
                steps.update(last_steps(self.path / METRICS))
            for file in (self.path / name for name in LOGS):
                if file.is_file() and (damaged := truncate_log(file, is_kept)):
                    self.messages.append(f"{damaged_lines_message(file, damaged)} removed")

        self.parallel.run_on_rank0(lambda: self._writing(write))
        return None if step is None else Logged(step, rows, steps)

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
        self.parallel.run_on_rank0(lambda: self._prune_checkpoints(pending.state["step"]))

    def prune_models(self) -> None:
        """Removes older models than `keep_models`; rank 0 calls it."""
        prune(self.models, self.config.keep_models)

    def finish(self, step: int, total_steps: int) -> None:
        """Notes that the run has ended by itself."""
        end = json.dumps({"finished_step": step, "total_steps": total_steps}).encode()
        self.parallel.run_on_rank0(lambda: self._writing(lambda: replace_file(self.path / "run.json", [end])))

    def _prune_checkpoints(self, step: int) -> None:
        drop_after(self.checkpoints, step)  # damaged ones, which this one replaces
        prune(self.checkpoints, self.config.keep_checkpoints)

    def _recover(self) -> None:
        for folder in (self.checkpoints, self.models, self.path):
            for name in recover(folder):
                self.messages.append(f"{folder / name}: recovered; a kill had interrupted its replacement")

    def _set_aside_former_attempt(self, step: int | None) -> None:
        """Move what a former attempt wrote, and this one would replace or mix with its own, to attempt-N."""
        resume = self.config.resume
        start, reached = "step 0, since there is no checkpoint", 0
        if step is None:
            found = [self.path / name for name in WRITTEN_BY_STEPS]
        elif resume == "auto":
            return
        elif Path(resume).resolve().parent == self.checkpoints.resolve():
            later = [*checkpoints(self.checkpoints), *checkpoints(self.models)]
            found, start = [path for path in later if step_of(path) > step], resume
            reached = max(map(step_of, found), default=0)
            found += [self.path / RUN_ID]
        else:
            found, start = [self.path / name for name in (*WRITTEN_BY_STEPS, "checkpoints")], resume
        found = [path for path in found if (path.is_file() if path.name in FILES else _holds_files(path))]
        if not found:
            return
        reached = max([reached, *(last_step(file) for file in found if file.name in LOGS)])
        if not reached and not any(path.name in ("models", "final", "checkpoints") for path in found):
            for path in found:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.messages.append(f"{self.path} holds a run that logged no step; training starts from {start}")
            return
        attempt = next(path for n in itertools.count(1) if not (path := self.path / f"attempt-{n}").exists())
        for path in found:
            moved = attempt / path.relative_to(self.path)
            moved.parent.mkdir(parents=True, exist_ok=True)
            path.rename(moved)
        self.messages.append(
            f"{self.path} holds a run that reached step {reached}; training starts from {start}. What that run wrote "
            f"is now in {attempt}"
        )

    def _try_writing(self) -> None:
        """Raise RunDirError or OSError when what is written into the folder cannot be. Leaves nothing behind."""
        for name in ("config.yml", ".lock", *FILES):
            if (self.path / name).is_dir():
                raise RunDirError(
                    f"{self.path / name}: is a folder, and training writes a file. Remove it.", "wrong-path"
                )
        for name in ("checkpoints", "models", "tensorboard"):
            if (self.path / name).is_file():
                raise RunDirError(
                    f"{self.path / name}: is a file, and training makes a folder. Remove it.", "wrong-path"
                )
        place = next(path for path in (self.path, *self.path.parents) if os.path.lexists(path))
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=place, ignore_cleanup_errors=True) as temporary:
            (Path(temporary) / self.path.relative_to(place)).mkdir(parents=True, exist_ok=True)

    def _take_lock(self) -> None:
        self._writing(lambda: self.path.mkdir(parents=True, exist_ok=True))
        self.lock = self._writing(lambda: open(self.path / ".lock", "a+"))
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.seek(0)
            raise RunDirError(
                f"{self.path}: another process trains in this folder ({self.lock.read().strip()}); "
                "wait for it, or choose another exp_name.",
                "locked",
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
            raise RunDirError(
                f"{self.path}: cannot be written: {error.strerror}. Set output_dir.", write_error_code(error)
            ) from None

    def _refuse_changes(self) -> None:
        """Raises RunDirError for a folder with a run that `resume` forbids, or that had other options."""
        holds_checkpoints = holds_checkpoint(self.checkpoints)
        if not holds_checkpoints and not (self.path / "config.yml").exists():
            return
        if self.config.resume == "never":
            raise RunDirError(
                f"{self.path} holds a run already: choose another exp_name, or resume=auto.", "already-exists"
            )
        trained = holds_checkpoints or checkpoints(self.models) or read_end(self.path)
        if self.config.resume != "auto" or not trained:
            return
        changes = dict(_changes(with_own_names(self._saved_settings(), loss_options), self.settings(), self.config))
        allowed = self.config.allow_changes
        refused = {key: told for key, told in changes.items() if not any(keys_overlap(key, name) for name in allowed)}
        if refused:
            told = "; ".join(f"{key}: {change}" for key, change in refused.items())
            raise RunDirError(
                f"{self.path} holds a run with other options ({told}). Choose another exp_name, take the options back, "
                f"or go on with them: allow_changes=[{','.join(refused)}].",
                "other-run",
            )

    def _saved_settings(self) -> dict:
        """The options of the run in this folder: those of config.yml, or of a checkpoint when it is damaged."""
        file = self.path / "config.yml"
        try:
            settings = read_settings(self.path)
            problem = f"{file}: is missing"
        except RunDirError as error:
            settings, problem = None, error.message
        if settings is not None:
            return settings
        for checkpoint in reversed(checkpoints(self.checkpoints)):
            with contextlib.suppress(*UNREADABLE, KeyError, TypeError):
                settings = json.loads((checkpoint / "state.json").read_text())["config"]
                if isinstance(settings, dict):
                    self.messages.append(f"{problem}. The options were compared with those in {checkpoint}")
                    return settings
        raise RunDirError(
            f"{problem}, and so are those that were changed. Write it again (the model card of best/ or final/ has its "
            "text), or choose another exp_name.",
            "damaged-file",
        )


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _changes(saved: Any, new: Any, schema: Any, path: str = ""):
    """(key, ``old -> new``) of each option that changes what is computed."""
    for f in option_fields(schema):
        if not f.metadata["affects_results"]:
            continue
        old, now, value = without_passwords(saved.get(f.name)), new.get(f.name), getattr(schema, f.name)
        if is_dataclass(value) and isinstance(old, dict):
            yield from _changes(old, now, value, f"{path}{f.name}.")
        elif old != now:
            yield f"{path}{f.name}", f"{_short(old)} -> {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value, default=str, skipkeys=True)
    return text if len(text) <= 80 else text[:77] + "..."
