"""The run directory: its former contents, whether this config may resume it, and what is written at the start."""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitrain.config.aliases import resolve_aliases
from minitrain.config.issues import keys_overlap
from minitrain.config.saved import config_yaml, saved_options, to_plain, without_passwords
from minitrain.config.schema import Config, option_fields
from minitrain.distributed.parallel import SingleDevice
from minitrain.errors import RunDirError, write_error_code
from minitrain.io.system import lock_file
from minitrain.losses import loss_options

from .atomic_dir import (
    checkpoints,
    drop_after,
    holds_checkpoint,
    latest_valid,
    prune,
    read_manifest,
    recover,
    remove_leftovers,
    replace_file,
    step_of,
    verify,
)
from .checkpoint import Save
from .metric_logger import LEDGER
from .metrics_log import (
    KINDS,
    METRICS,
    ROLLOUTS,
    SAMPLES,
    UNREADABLE,
    damaged_lines_message,
    drop_rounds,
    last_step,
    last_steps,
    read_end,
    read_settings,
    truncate_log,
)
from .trackers import RUN_ID, Logged

LOGS = (METRICS, LEDGER, SAMPLES)
FILES = (*LOGS, RUN_ID)
# What a restart from step 0 would overwrite.
WRITTEN_BY_STEPS = (*FILES, "tensorboard", ROLLOUTS, "models", "best", "final")
INPUTS = {
    "datasets": "other data: the files, the tokenizer or their options have changed",
    "model": "another base model: the files of model.name_or_path have changed",
}


class RunDir:
    """``output_dir/exp_name``. Rank 0 writes and decides; the other ranks get its results and errors."""

    def __init__(self, config: Config, parallel: SingleDevice):
        """Raise RunDirError if the directory cannot be written, or holds a run that must not be resumed."""
        self.config, self.parallel = config, parallel
        self.path = Path(config.output_dir) / config.exp_name
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"
        self.best = self.path / "best"
        self.models = self.path / "models"
        self.lock = None
        self.messages: list[str] = []  # about damage and interruptions, for the console
        self.pending: Save | None = None  # a checkpoint that is being written
        parallel.run_on_rank0(lambda: self._writing(self._check_writable))
        parallel.run_on_rank0(self._check_options)

    def settings(self) -> dict:
        """Return the config for trackers. References to the environment stay unresolved."""
        return saved_options(self.config)

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step}"

    def model(self, step: int) -> Path:
        return self.models / f"step-{step}"

    def finished(self, total_steps: int) -> str | None:
        """Return a message if a run of at least `total_steps` steps has finished here, else None.

        Raises:
            RunDirError: If a shorter run has finished without a checkpoint to resume from, or `resume` names a folder
                that is not a checkpoint.
        """
        ended = self.parallel.run_on_rank0(lambda: read_end(self.path))
        if ended is None:
            return None
        finished, planned = ended
        if planned >= total_steps:
            if self.config.resume not in ("auto", "never"):  # check the folder although it is not used
                self.parallel.run_on_rank0(lambda: read_manifest(Path(self.config.resume)))
            early = f" (stopped early, of {planned})" if finished < planned else ""
            return f"{self.path} is finished: {finished} steps{early}. To train again, set another exp_name."
        if self.config.resume == "auto" and not self.parallel.run_on_rank0(lambda: holds_checkpoint(self.checkpoints)):
            raise RunDirError(
                f"{self.path}: finished at step {finished} without a checkpoint (see save_every_steps), so it cannot "
                "be resumed. Set another exp_name.",
                "other-run",
            )
        return None

    def find_checkpoint(self) -> Path | None:
        """Return the checkpoint that `resume` selects, or None. Add damaged ones to `messages`.

        Raises:
            RunDirError: If the selected checkpoint is damaged, or none is valid.
        """
        resume = self.config.resume
        if resume == "never":
            return None
        if resume != "auto":
            verify(Path(resume), self.parallel)
            return Path(resume)
        checkpoint, messages = latest_valid(self.checkpoints, self.parallel)
        self.messages += messages
        return checkpoint

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory against other processes, and complete what a kill interrupted.

        Raises:
            RunDirError: If another process trains in it.
        """
        self.parallel.run_on_rank0(self._take_lock)
        self.parallel.run_on_rank0(lambda: self._writing(self._recover))
        try:
            yield
        finally:
            if self.lock is not None:  # a kill releases the lock, too
                self.lock.close()

    def check_fingerprints(self, checkpoint: Path, saved: dict[str, list], current: dict[str, list]) -> None:
        """Raise RunDirError if the data or the base model of a checkpoint differ."""
        for name, fingerprint in saved.items():
            if fingerprint != current[name] and name not in self.config.allow_changes:
                raise RunDirError(
                    f"{checkpoint}: belongs to a run with {INPUTS[name]}. Restore them, set another exp_name, or "
                    f"resume with the current ones: allow_changes=[{name}].",
                    "other-run",
                )

    def start(self, step: int | None, evaluates: bool) -> Logged | None:
        """Write config.yml, and remove leftovers of a kill and all logs and models after `step`.

        Args:
            step: Step of the checkpoint; None without one.
            evaluates: Whether `step` is evaluated again, so that its evaluation is removed from the logs.

        Returns:
            On rank 0, what has been logged, for trackers; None without a checkpoint.
        """

        rows, steps = [], {}

        def is_kept(row: dict) -> bool:
            again = row.get("kind") == "rollout" or (evaluates and row.get("kind") == "eval")
            if row["step"] != step or again:
                return row["step"] < step
            if row.get("kind") in KINDS:
                rows.append(row)
            return True

        def write() -> None:
            for folder in (self.checkpoints, self.models, self.path):
                remove_leftovers(folder)
            self._move_former_attempt(step)
            replace_file(self.path / "config.yml", [config_yaml(self.config).encode()])
            prune(self.checkpoints, self.config.keep_checkpoints, step)
            drop_after(self.models, step or 0)
            if step is None:
                return
            drop_rounds(self.path, step)
            if (self.path / METRICS).is_file() and (self.path / RUN_ID).is_file():
                steps.update(last_steps(self.path / METRICS))
            for file in (self.path / name for name in LOGS):
                if file.is_file() and (damaged := truncate_log(file, is_kept)):
                    self.messages.append(f"{damaged_lines_message(file, damaged)} removed")

        self.parallel.run_on_rank0(lambda: self._writing(write))
        return None if step is None else Logged(step, rows, steps)

    def save_checkpoint(
        self,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict,
        data: dict[str, torch.Tensor],
        reference: list[torch.Tensor] | None = None,
    ) -> None:
        """Write a checkpoint. With `save_async`, training continues during the write.

        Args:
            state: Values for state.json.
            data: Tensors of the data that is being trained on, the same on all ranks.
            reference: This rank's shards of a reference that moves.
        """
        self.finish_saving()
        folder = self.checkpoint(state["step"])
        self.pending = Save(folder, policy, optimizer, state, self.parallel, self.config.save_async, data, reference)
        if self.config.save_async:
            self.pending.start()
        else:
            self.pending.write()
            self.finish_saving()

    def finish_saving(self, wait: bool = True) -> None:
        """Commit the checkpoint being written. Without `wait`, only if all ranks have written their files."""
        if self.pending is None or (not wait and self.parallel.max(int(self.pending.running))):
            return
        pending, self.pending = self.pending, None
        pending.commit()
        self.parallel.run_on_rank0(lambda: self._prune_checkpoints(pending.state["step"]))

    def prune_models(self) -> None:
        """Remove all but the newest `keep_models` models. Only rank 0 calls it."""
        prune(self.models, self.config.keep_models)

    def finish(self, step: int, total_steps: int) -> None:
        """Record in run.json that the run has finished."""
        end = json.dumps({"finished_step": step, "total_steps": total_steps}).encode()
        self.parallel.run_on_rank0(lambda: self._writing(lambda: replace_file(self.path / "run.json", [end])))

    def _prune_checkpoints(self, step: int) -> None:
        drop_after(self.checkpoints, step)  # damaged ones that this one replaces
        prune(self.checkpoints, self.config.keep_checkpoints)

    def _recover(self) -> None:
        for folder in (self.checkpoints, self.models, self.path):
            for name in recover(folder):
                self.messages.append(f"{folder / name}: recovered after an interrupted replacement")

    def _move_former_attempt(self, step: int | None) -> None:
        """Move the files of a former attempt that this one would overwrite or append to into attempt-N."""
        resume = self.config.resume
        start, reached = "step 0, because there is no checkpoint", 0
        if step is None:
            paths = [self.path / name for name in WRITTEN_BY_STEPS]
        elif resume == "auto":
            return
        elif Path(resume).resolve().parent == self.checkpoints.resolve():
            later = [*checkpoints(self.checkpoints), *checkpoints(self.models)]
            paths, start = [path for path in later if step_of(path) > step], resume
            reached = max(map(step_of, paths), default=0)
            paths += [self.path / RUN_ID]
        else:
            paths, start = [self.path / name for name in (*WRITTEN_BY_STEPS, "checkpoints")], resume
        paths = [path for path in paths if (path.is_file() if path.name in FILES else _holds_files(path))]
        if not paths:
            return
        reached = max([reached, *(last_step(file) for file in paths if file.name in LOGS)])
        if not reached and not any(path.name in ("models", "final", "checkpoints") for path in paths):
            for path in paths:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.messages.append(f"{self.path}: contains a run that logged no step. Training starts from {start}.")
            return
        attempt = next(path for n in itertools.count(1) if not (path := self.path / f"attempt-{n}").exists())
        for path in paths:
            moved = attempt / path.relative_to(self.path)
            moved.parent.mkdir(parents=True, exist_ok=True)
            path.rename(moved)
        self.messages.append(
            f"{self.path}: contains a run that reached step {reached}. Training starts from {start}. The files of that "
            f"run are now in {attempt}."
        )

    def _check_writable(self) -> None:
        """Raise RunDirError or OSError if the directory cannot be written. Leaves no files."""
        for name in ("config.yml", ".lock", *FILES):
            if (self.path / name).is_dir():
                raise RunDirError(
                    f"{self.path / name}: is a folder, but training writes a file. Remove it.", "wrong-path"
                )
        for name in ("checkpoints", "models", "tensorboard", ROLLOUTS):
            if (self.path / name).is_file():
                raise RunDirError(
                    f"{self.path / name}: is a file, but training creates a folder. Remove it.", "wrong-path"
                )
        existing = next(path for path in (self.path, *self.path.parents) if os.path.lexists(path))
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=existing, ignore_cleanup_errors=True) as temporary:
            (Path(temporary) / self.path.relative_to(existing)).mkdir(parents=True, exist_ok=True)

    def _take_lock(self) -> None:
        self._writing(lambda: self.path.mkdir(parents=True, exist_ok=True))
        self.lock = self._writing(lambda: open(self.path / ".lock", "a+"))
        try:
            lock_file(self.lock)
        except OSError:
            self.lock.seek(0)
            raise RunDirError(
                f"{self.path}: another process trains in this directory ({self.lock.read().strip()}). Wait for it, or "
                "set another exp_name.",
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

    def _check_options(self) -> None:
        """Raise RunDirError if the directory holds a run that `resume` excludes, or one with other options."""
        holds_checkpoints = holds_checkpoint(self.checkpoints)
        if not holds_checkpoints and not (self.path / "config.yml").exists():
            return
        if self.config.resume == "never":
            raise RunDirError(
                f"{self.path}: already contains a run. Set another exp_name, or resume=auto.", "already-exists"
            )
        trained = holds_checkpoints or checkpoints(self.models) or read_end(self.path)
        if self.config.resume != "auto" or not trained:
            return
        changes = dict(_changes(resolve_aliases(self._saved_settings(), loss_options), self.settings(), self.config))
        allowed = self.config.allow_changes
        refused = {key: text for key, text in changes.items() if not any(keys_overlap(key, name) for name in allowed)}
        if refused:
            described = "; ".join(f"{key}: {text}" for key, text in refused.items())
            raise RunDirError(
                f"{self.path}: contains a run with other options ({described}). Set another exp_name, restore the "
                f"options, or resume anyway with allow_changes=[{','.join(refused)}].",
                "other-run",
            )

    def _saved_settings(self) -> dict:
        """Return the options of the run in this directory, from config.yml or, if it is damaged, from a checkpoint."""
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
                settings = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["config"]
                if isinstance(settings, dict):
                    self.messages.append(f"{problem}. The options were compared with those of {checkpoint}.")
                    return settings
        raise RunDirError(
            f"{problem}, so changed options cannot be detected. Restore it (the model card in best/ or final/ contains "
            "it), or set another exp_name.",
            "damaged-file",
        )


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _changes(saved: Any, new: Any, schema: Any, path: str = ""):
    """Yield (key, ``old -> new``) for each changed option that affects results.

    A run of an older version lacks newer options, and did what they do at their default.
    """
    for f in option_fields(schema):
        if not f.metadata["affects_results"]:
            continue
        old = saved[f.name] if f.name in saved else to_plain(_default(f))
        old, current, value = without_passwords(old), new.get(f.name), getattr(schema, f.name)
        if dataclasses.is_dataclass(value) and isinstance(old, dict):
            yield from _changes(old, current, value, f"{path}{f.name}.")
        elif old != current:
            yield f"{path}{f.name}", f"{_short(old)} -> {_short(current)}"


def _default(f: dataclasses.Field) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _short(value: Any) -> str:
    text = json.dumps(value, default=str, skipkeys=True)
    return text if len(text) <= 80 else text[:77] + "..."
