"""Folders that are whole or not there: written beside their place, flushed, then renamed; checked when read."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import RunError, RunFolderError
from .faults import failpoint
from .parallel import SingleDevice


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends well, and is gone otherwise.

    Raises RunError when the disk is full or the folder cannot be written.
    """
    temporary = beside(target, "tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            fsync(file)
        take_place(temporary, target)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{target}: cannot be written: {reason(error)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def verify(folder: Path, parallel: SingleDevice) -> None:
    """Checks every file against the manifest, each rank some of them. Raises RunFolderError that names the files."""
    wanted = parallel.first(lambda: _read_manifest(folder))
    mine = list(wanted)[parallel.rank :: parallel.world_size]
    wrong = [_complaint(folder / name, wanted[name]) for name in mine]
    told = [text for found in parallel.gather(list(filter(None, wrong))) for text in found]
    if told:
        raise RunFolderError("; ".join(told))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints (or models) in a folder, oldest first. What has such a name was committed; damage came later."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name[5:])


def newest_sound(folder: Path, parallel: SingleDevice) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with newer ones.

    Raises RunFolderError when there are checkpoints and none is sound: starting anew is the user's decision.
    """
    complaints = []
    found = parallel.first(lambda: [str(path) for path in checkpoints(folder)])
    for path in map(Path, reversed(found)):
        try:
            verify(path, parallel)
            return path, complaints
        except RunFolderError as error:
            complaints.append(str(error))
    if found:
        raise RunFolderError("no checkpoint is sound: " + "; ".join(complaints) + f". To start anew, remove {folder}.")
    return None, []


def prune(folder: Path, keep: int | None) -> None:
    """Removes all but the newest `keep` checkpoints, or with None no checkpoint, and what a crash left behind."""
    _remove(checkpoints(folder)[:-keep] if keep else [])
    sweep(folder)


def drop_after(folder: Path, step: int) -> None:
    """Removes the checkpoints of later steps."""
    _remove([path for path in checkpoints(folder) if step_of(path) > step])


def _remove(found: list[Path]) -> None:
    for path in found:
        failpoint("prune.before")
        trash = beside(path, "trash")
        path.rename(trash)
        failpoint("prune.renamed")
        shutil.rmtree(trash, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Removes what a crash left behind."""
    for debris in (*folder.glob(".trash-*"), *folder.glob(".tmp-*")):
        shutil.rmtree(debris, ignore_errors=True)


def _read_manifest(folder: Path) -> dict[str, dict]:
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        assert all(isinstance(entry, dict) for entry in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        told = "manifest.json is missing or damaged, so this is no complete checkpoint (like RUN/checkpoints/step-N)"
        raise RunFolderError(f"{folder}: {told}") from None
    for name in files:
        if Path(name).name != name:
            raise RunFolderError(f"{folder}: manifest.json names {name!r}, which is outside of the checkpoint")
    if missing := {"index.json", "state.json"} - files.keys():
        raise RunFolderError(f"{folder}: manifest.json does not name {', '.join(sorted(missing))}")
    return files


def _complaint(file: Path, wanted: dict) -> str | None:
    try:
        damaged = file.stat().st_size != wanted.get("bytes") or fingerprint(file) != wanted
    except OSError:
        return f"{file}: is missing"
    return f"{file}: is damaged (its size or SHA-256 is not that of the manifest)" if damaged else None


def fingerprint(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def beside(target: Path, kind: str) -> Path:
    return target.parent / f".{kind}-{target.name}-{uuid.uuid4().hex[:8]}"


def take_place(temporary: Path, target: Path) -> None:
    """Renames a written folder to its place; what was there goes only once the new one is there."""
    fsync(temporary)
    trash = beside(target, "trash")
    if target.exists():
        target.rename(trash)
    temporary.rename(target)
    fsync(target.parent)
    shutil.rmtree(trash, ignore_errors=True)


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
