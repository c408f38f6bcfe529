"""Folders and files that are complete or not there: written under another name, flushed, renamed; verified when read.

Hidden folders next to NAME, each with a random suffix:

    .tmp-NAME-*     being written, incomplete
    .new-NAME-*     complete, about to become NAME
    .trash-NAME-*   being removed

A kill leaves them: `recover` completes what is complete, `sweep` removes the rest.
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

from .failpoints import failpoint

if TYPE_CHECKING:  # it imports torch, and `minitrain plot` needs none
    from minitrain.distributed.parallel import SingleDevice


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends well, and is gone otherwise.

    Raises RunError when the disk is full or the folder cannot be written.
    """
    temporary = sibling(target, "tmp")
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
    """Checks every file against the manifest, each rank some of them. Raises RunDirError that names the files."""
    wanted = parallel.run_on_rank0(lambda: read_manifest(folder))
    mine = list(wanted)[parallel.rank :: parallel.world_size]
    wrong = [_complaint(folder / name, wanted[name]) for name in mine]
    told = [text for found in parallel.gather(list(filter(None, wrong))) for text in found]
    if told:
        raise RunDirError("; ".join(told), "damaged-file")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints (or models) in a folder, oldest first. What has such a name was committed; damage came later."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=step_of)


def holds_checkpoint(folder: Path) -> bool:
    """Whether there is a checkpoint, also one whose replacement a kill interrupted."""
    return any(True for pattern in ("step-*", ".new-step-*") for _ in folder.glob(pattern))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name[5:])


def latest_valid(folder: Path, parallel: "SingleDevice") -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with newer ones.

    Raises RunDirError when there are checkpoints and none is sound: starting anew is the user's decision.
    """
    complaints = []
    found = parallel.run_on_rank0(lambda: [str(path) for path in checkpoints(folder)])
    for path in map(Path, reversed(found)):
        try:
            verify(path, parallel)
            return path, complaints
        except RunDirError as error:
            complaints.append(error.message)
    if found:
        raise RunDirError(
            "no checkpoint is sound: " + "; ".join(complaints) + f". To start anew, remove {folder}.", "damaged-file"
        )
    return None, []


def prune(folder: Path, keep: int | None, step: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints up to `step` (None: no checkpoint, of any step), and debris."""
    found = [path for path in checkpoints(folder) if step is None or step_of(path) <= step]
    _remove(found[:-keep] if keep else [])
    sweep(folder)


def drop_after(folder: Path, step: int) -> None:
    """Removes the checkpoints of later steps."""
    _remove([path for path in checkpoints(folder) if step_of(path) > step])


def _remove(found: list[Path]) -> None:
    for path in found:
        failpoint("prune.before")
        trash = sibling(path, "trash")
        path.rename(trash)
        failpoint("prune.renamed")
        shutil.rmtree(trash, ignore_errors=True)


def recover(folder: Path, name: str | None = None) -> list[str]:
    """Complete the replacements in a folder that a kill interrupted, so that the last of a name is never lost.

    Args:
        name: Of the only one to complete; None for all.

    Returns:
        The names of the folders that were put back.
    """
    recovered = []
    for path in sorted(folder.glob(_hidden("new", name))):
        target = folder / path.name.removeprefix(".new-").rpartition("-")[0]
        if target.exists():
            target.rename(sibling(target, "trash"))
        failpoint("recover.new")
        path.rename(target)
        recovered.append(target.name)
    return recovered


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what a kill left half written or half removed, of one name or of all."""
    for debris in (*folder.glob(_hidden("trash", name)), *folder.glob(_hidden("tmp", name))):
        debris.unlink() if debris.is_file() else shutil.rmtree(debris, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, dict]:
    """Return size and hash of each file of a checkpoint. Raises RunDirError for a folder that is none."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        files, step = manifest["files"], manifest["step"]
        assert all(isinstance(entry, dict) for entry in files.values()) and type(step) is int
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError):
        told = "manifest.json is missing or damaged, so this is no complete checkpoint (like RUN/checkpoints/step-N)"
        raise RunDirError(f"{folder}: {told}", "damaged-file") from None
    if re.fullmatch(r"step-\d+", folder.name) and step_of(folder) != step:
        raise RunDirError(f"{folder}: holds the checkpoint of step {step}. Rename it to step-{step}", "mismatch")
    for name in files:
        if Path(name).name != name:
            raise RunDirError(
                f"{folder}: manifest.json names {name!r}, which is outside of the checkpoint", "damaged-file"
            )
    if missing := {"index.json", "state.json"} - files.keys():
        raise RunDirError(f"{folder}: manifest.json does not name {', '.join(sorted(missing))}", "damaged-file")
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


def sibling(target: Path, kind: str) -> Path:
    """A hidden name next to `target`, as at the top of this file."""
    return target.parent / f".{kind}-{target.name}-{uuid.uuid4().hex[:8]}"


def _hidden(kind: str, name: str | None) -> str:
    """Return a pattern for what `sibling` makes, for one name or for all."""
    return f".{kind}-*" if name is None else f".{kind}-{glob.escape(name)}-{'[0-9a-f]' * 8}"


def replace_folder(temporary: Path, target: Path) -> None:
    """Rename a complete folder to `target`. What was there is removed once the new one is in its place.

    Raises OSError, and then `target` is as it was. After a kill in the middle `recover` completes it.
    """
    fsync(temporary)
    new, trash = sibling(target, "new"), sibling(target, "trash")
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
    """Write a file under another name, then rename it, so that a kill leaves the old content or the new."""
    temporary = sibling(path, "tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        failpoint("replace.file")
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
