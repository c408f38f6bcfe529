"""Atomic writes of directories and files: written under a temporary name, flushed, then renamed.

A write uses hidden names next to NAME, each with a random suffix:

    .tmp-NAME-*     being written, incomplete
    .new-NAME-*     complete, about to become NAME
    .trash-NAME-*   being removed

They remain after a kill. `recover` then renames complete ones, and `remove_leftovers` removes the rest.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from minitrain.errors import RunDirError, RunError, write_error_code
from minitrain.io.system import fsync

from .failpoints import failpoint

if TYPE_CHECKING:  # it imports torch, which `minitrain plot` does not need
    from minitrain.distributed.parallel import SingleDevice


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary directory that replaces `target` if the block succeeds, and is removed otherwise.

    Raises:
        RunError: If the disk is full or the directory cannot be written.
    """
    temporary = temp_sibling(target, "tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            fsync(file)
        replace_folder(temporary, target)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{target}: cannot be written: {reason(error)}", write_error_code(error)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def verify(folder: Path, parallel: "SingleDevice") -> None:
    """Check every file against the manifest, with the work split over ranks. Raise RunDirError with the bad files."""
    manifest = parallel.run_on_rank0(lambda: read_manifest(folder))
    names = list(manifest)[parallel.rank :: parallel.world_size]
    problems = [_check_file(folder / name, manifest[name]) for name in names]
    messages = [message for part in parallel.gather(list(filter(None, problems))) for message in part]
    if messages:
        raise RunDirError("; ".join(messages), "damaged-file")


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints (or models) in a directory, oldest first. Each was complete when it was written."""
    paths = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(paths, key=step_of)


def holds_checkpoint(folder: Path) -> bool:
    """Return whether there is a checkpoint, including one whose replacement was interrupted by a kill."""
    return any(True for pattern in ("step-*", ".new-step-*") for _ in folder.glob(pattern))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name[5:])


def latest_valid(folder: Path, parallel: "SingleDevice") -> tuple[Path | None, list[str]]:
    """Return the newest valid checkpoint, and messages about newer, damaged ones.

    Raises:
        RunDirError: If there are checkpoints but none is valid. Only the user can decide to start again.
    """
    messages = []
    paths = parallel.run_on_rank0(lambda: [str(path) for path in checkpoints(folder)])
    for path in map(Path, reversed(paths)):
        try:
            verify(path, parallel)
            return path, messages
        except RunDirError as error:
            messages.append(error.message)
    if paths:
        raise RunDirError(
            f"no checkpoint is valid: {'; '.join(messages)}. To start again from step 0, remove {folder}.",
            "damaged-file",
        )
    return None, []


def prune(folder: Path, keep: int | None, step: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints up to `step`, and leftovers of a kill.

    Args:
        keep: None keeps all checkpoints.
        step: None considers checkpoints of all steps.
    """
    paths = [path for path in checkpoints(folder) if step is None or step_of(path) <= step]
    _remove(paths[:-keep] if keep else [])
    remove_leftovers(folder)


def drop_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps."""
    _remove([path for path in checkpoints(folder) if step_of(path) > step])


def _remove(paths: list[Path]) -> None:
    for path in paths:
        failpoint("prune.before")
        trash = temp_sibling(path, "trash")
        path.rename(trash)
        failpoint("prune.renamed")
        shutil.rmtree(trash, ignore_errors=True)


def recover(folder: Path, name: str | None = None) -> list[str]:
    """Complete the replacements in a directory that a kill interrupted, so that the newest version is never lost.

    Args:
        name: The only name to complete; None for all.

    Returns:
        The names of the recovered directories.
    """
    recovered = []
    for path in sorted(folder.glob(_hidden("new", name))):
        target = folder / path.name.removeprefix(".new-").rpartition("-")[0]
        if target.exists():
            target.rename(temp_sibling(target, "trash"))
        failpoint("recover.new")
        path.rename(target)
        recovered.append(target.name)
    return recovered


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what a kill left half-written or half-removed, for one name or for all."""
    for path in (*folder.glob(_hidden("trash", name)), *folder.glob(_hidden("tmp", name))):
        path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, dict]:
    """Return size and hash of each file of a checkpoint. Raise RunDirError if it is not a complete checkpoint."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files, step = manifest["files"], manifest["step"]
        assert all(isinstance(entry, dict) for entry in files.values()) and type(step) is int
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError):
        message = "manifest.json is missing or damaged. Choose a complete checkpoint, such as RUN/checkpoints/step-N."
        raise RunDirError(f"{folder}: {message}", "damaged-file") from None
    if re.fullmatch(r"step-\d+", folder.name) and step_of(folder) != step:
        raise RunDirError(f"{folder}: contains the checkpoint of step {step}. Rename it to step-{step}.", "mismatch")
    for name in files:
        if Path(name).name != name:
            raise RunDirError(
                f"{folder}: manifest.json lists {name!r}, which is outside of the checkpoint. Remove the checkpoint.",
                "damaged-file",
            )
    if missing := {"index.json", "state.json"} - files.keys():
        raise RunDirError(
            f"{folder}: manifest.json does not list {', '.join(sorted(missing))}. Remove the checkpoint.",
            "damaged-file",
        )
    return files


def _check_file(file: Path, expected: dict) -> str | None:
    """Return what is wrong with a file of a checkpoint, or None."""
    try:
        damaged = file.stat().st_size != expected.get("bytes") or fingerprint(file) != expected
    except OSError:
        return f"{file}: is missing"
    return f"{file}: is damaged (its size or SHA-256 differs from the manifest)" if damaged else None


def fingerprint(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def temp_sibling(target: Path, kind: str) -> Path:
    """Return a hidden name next to `target`, as described at the top of this file."""
    return target.parent / f".{kind}-{target.name}-{uuid.uuid4().hex[:8]}"


def _hidden(kind: str, name: str | None) -> str:
    """Return a glob pattern for the names of `temp_sibling`, for one target or for all."""
    return f".{kind}-*" if name is None else f".{kind}-{glob.escape(name)}-{'[0-9a-f]' * 8}"


def replace_folder(temporary: Path, target: Path) -> None:
    """Rename a complete directory to `target`. An old `target` is removed after the new one has its name.

    After a kill in the middle, `recover` completes the replacement.

    Raises:
        OSError: `target` is then unchanged.
    """
    fsync(temporary)
    new, trash = temp_sibling(target, "new"), temp_sibling(target, "trash")
    temporary.rename(new)
    try:
        failpoint("replace.new")
        if target.exists():
            target.rename(trash)
        failpoint("replace.old")
        new.rename(target)
        failpoint("replace.done")
    except OSError:
        if trash.exists() and not target.exists():
            trash.rename(target)
        shutil.rmtree(new, ignore_errors=True)
        raise
    fsync(target.parent)
    shutil.rmtree(trash, ignore_errors=True)


def replace_file(path: Path, lines: Iterable[bytes]) -> None:
    """Write a file under a temporary name, then rename it, so that a kill leaves the old or the new content."""
    temporary = temp_sibling(path, "tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        failpoint("replace.file")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
