"""The run folder: what is in it already, whether this config may go on with it, and what is written at the start."""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from .config import config_yaml
from .engine.checkpoint import newest_sound, prune, verify
from .errors import RunFolderError
from .schema import Config


class RunFolder:
    """``output_dir/exp_name``."""

    def __init__(self, config: Config):
        self.config = config
        self.path = Path(config.output_dir) / config.exp_name
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"
        self.best = self.path / "best"

    def settings(self) -> dict:
        """The config as trackers get it: what came from the environment stays unresolved."""
        return yaml.safe_load(config_yaml(self.config))

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step}"

    def finished_steps(self) -> tuple[int, int] | None:
        """(steps taken, steps planned) of an earlier run that ended, if one did."""
        try:
            ended = json.loads((self.path / "run.json").read_text())
            return ended["finished_step"], ended["total_steps"]
        except (OSError, ValueError, KeyError):
            return None

    def find_checkpoint(self) -> tuple[Path | None, list[str]]:
        """The checkpoint to go on from, as `resume` says, and complaints about damaged ones.

        Raises RunFolderError when the folder holds something this run must not write over or cannot go on with.
        """
        resume = self.config.resume
        if resume not in ("auto", "never"):
            verify(Path(resume))
            return Path(resume), []
        if resume == "never":
            if (self.path / "config.yml").exists():
                raise RunFolderError(f"{self.path} holds a run already: choose another exp_name, or resume=auto.")
            return None, []
        checkpoint, complaints = newest_sound(self.checkpoints)
        if checkpoint is not None or self.finished_steps() is not None:
            self._refuse_changes()
        return checkpoint, complaints

    def start(self) -> None:
        """Makes the folder and writes config.yml. Raises RunFolderError when it cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "config.yml").write_text(config_yaml(self.config))
        except OSError as error:
            raise RunFolderError(f"{self.path}: cannot be written: {error.strerror}. Set output_dir.") from None
        self.prune()

    def prune(self) -> None:
        """Keeps the newest checkpoints only, and removes what a crash left."""
        prune(self.checkpoints, self.config.keep_checkpoints)

    def finish(self, step: int, total_steps: int) -> None:
        (self.path / "run.json").write_text(json.dumps({"finished_step": step, "total_steps": total_steps}))

    def rewind_metrics(self, step: int) -> None:
        """Drops the lines of metrics.jsonl after `step`, which will be written anew."""
        file = self.path / "metrics.jsonl"
        if file.exists():
            lines = file.read_text().splitlines()
            file.write_text("".join(f"{line}\n" for line in lines if _step_of(line) <= step) if step else "")

    def _refuse_changes(self) -> None:
        try:
            saved = yaml.safe_load((self.path / "config.yml").read_text())
        except (OSError, yaml.YAMLError):
            return
        changes = list(_changes(saved if isinstance(saved, dict) else {}, self.settings(), self.config))
        if changes:
            told = "; ".join(changes)
            raise RunFolderError(
                f"{self.path} holds a run with other options ({told}). "
                "Choose another exp_name, take the options back, or remove the folder."
            )


def _changes(saved: Any, new: Any, schema: Any, path: str = ""):
    """``key: old -> new`` for each option that changes what is computed."""
    for f in fields(schema):
        if not f.init or f.metadata["free"]:
            continue
        old, now, value = saved.get(f.name), new.get(f.name), getattr(schema, f.name)
        if is_dataclass(value) and isinstance(old, dict):
            yield from _changes(old, now, value, f"{path}{f.name}.")
        elif old != now:
            yield f"{path}{f.name}: {_short(old)} -> {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _step_of(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return 1 << 62  # a line cut off by a crash
