"""Checkpoints that a crash cannot spoil: written beside, flushed, hashed, then renamed into place.

    checkpoints/step-100/   model.safetensors      the trained parameters
                            optimizer.safetensors  its state, `parameter/name of the state`
                            rng.safetensors        random number generators
                            state.json             position, schedule, scaler and the like
                            manifest.json          size and SHA-256 of each; written last

No pickle: tensors are safetensors, the rest is JSON.
"""

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

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import RunError, RunFolderError


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends well, and is gone otherwise.

    Raises RunError when the disk is full or the folder cannot be written.
    """
    name = uuid.uuid4().hex[:8]
    temporary = target.parent / f".tmp-{target.name}-{name}"
    trash = target.parent / f".trash-{target.name}-{name}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            _fsync(file)
        _fsync(temporary)
        if target.exists():
            target.rename(trash)
        temporary.rename(target)
        _fsync(target.parent)
    except OSError as error:
        raise RunError(f"{target}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(trash, ignore_errors=True)


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Writes model, optimizer, `state` (JSON) and the random number generators as one committed checkpoint."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    tensors, numbers = _optimizer_state(model, optimizer)
    with atomic_folder(folder) as temporary:
        save_file(_contiguous(trained), temporary / "model.safetensors")
        save_file(_contiguous(tensors), temporary / "optimizer.safetensors")
        save_file(_rng_state(), temporary / "rng.safetensors")
        (temporary / "state.json").write_text(json.dumps(state | {"optimizer": numbers}, indent=1))
        files = {file.name: _fingerprint(file) for file in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps({"files": files}, indent=1))


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restores what `save_checkpoint` wrote into model and optimizer; returns the state.

    The random number generators are restored by `restore_rng`, when nothing will draw from them any more before
    the first step. Raises RunFolderError when the checkpoint is damaged or of another model.
    """
    verify(folder)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved = load_file(folder / "model.safetensors")
    if saved.keys() != parameters.keys() or any(saved[n].shape != p.shape for n, p in parameters.items()):
        raise RunFolderError(
            f"{folder}: holds other parameters than this model trains; were the model or freeze_layers changed?"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    state = json.loads((folder / "state.json").read_text())
    _load_optimizer_state(folder, model, optimizer, state.pop("optimizer"))
    return state


def restore_rng(folder: Path) -> None:
    saved = load_file(folder / "rng.safetensors")
    torch.set_rng_state(saved["cpu"])
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])


def verify(folder: Path) -> None:
    """Checks every file against the manifest. Raises RunFolderError that names the file."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RunFolderError(f"{folder}: manifest.json is missing or damaged; this is no complete checkpoint") from None
    for name, wanted in files.items():
        if Path(name).name != name:
            raise RunFolderError(f"{folder}: manifest.json names {name!r}, which is outside of the checkpoint")
        try:
            found = _fingerprint(folder / name)
        except OSError:
            raise RunFolderError(f"{folder / name}: is missing") from None
        if found != wanted:
            raise RunFolderError(f"{folder / name}: is damaged (its size or SHA-256 is not that of the manifest)")


def checkpoints(folder: Path) -> list[Path]:
    """The committed checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted((path for path in found if (path / "manifest.json").exists()), key=lambda p: int(p.name[5:]))


def newest_sound(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with newer ones.

    Raises RunFolderError when there are checkpoints and none is sound: starting anew is the user's decision.
    """
    complaints = []
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            verify(path)
            return path, complaints
        except RunFolderError as error:
            complaints.append(str(error))
    if found:
        raise RunFolderError("no checkpoint is sound: " + "; ".join(complaints) + f". To start anew, remove {folder}.")
    return None, []


def prune(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what a crash left behind."""
    for path in checkpoints(folder)[:-keep]:
        trash = path.with_name(f".trash-{path.name}-{uuid.uuid4().hex[:8]}")
        path.rename(trash)
    for debris in (*folder.glob(".trash-*"), *folder.glob(".tmp-*")):
        shutil.rmtree(debris, ignore_errors=True)


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict]:
    names = {id(p): name for name, p in model.named_parameters()}
    tensors, numbers = {}, {}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            kept = tensors if isinstance(value, Tensor) else numbers
            kept[f"{names[id(parameter)]}/{key}"] = value
    return tensors, numbers


def _load_optimizer_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, numbers: dict) -> None:
    try:
        entries = load_file(folder / "optimizer.safetensors") | numbers
    except SafetensorError as error:
        raise RunFolderError(f"{folder / 'optimizer.safetensors'}: is damaged: {error}") from None
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for name, value in entries.items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters[parameter_name]
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value = value.to(parameter.device)
        elif isinstance(value, Tensor) and optimizer.param_groups[0].get("fused"):
            value = value.to(parameter.device)  # a fused optimizer counts its steps on the device
        optimizer.state[parameter][key] = value


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _rng_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _fingerprint(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
