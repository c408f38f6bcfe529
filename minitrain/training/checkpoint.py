"""Checkpoints that a crash cannot spoil: written beside, flushed, hashed, then renamed into place.

    checkpoints/step-100/   model-0.safetensors      rank 0's rows of the trained parameters
                            optimizer-0.safetensors  and of the optimizer's state, `parameter/name of the state`
                            rng-0.safetensors        its random number generators
                            ...                      the same of rank 1, 2, ...
                            index.json               of each tensor: its shape, and which file holds which rows
                            state.json               position, schedule, scaler and the like
                            manifest.json            size and SHA-256 of each file; written last

Any number of ranks reads the rows that it needs. No pickle: tensors are safetensors, the rest is JSON.
"""

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from minitrain.distributed.parallel import SingleDevice, local_shard, writes
from minitrain.errors import RunDirError, RunError, write_error_code
from minitrain.io.tensor_files import save_file

from .atomic_dir import fingerprint, fsync, reason, replace_folder, sibling
from .failpoints import failpoint

SPARE = 1.2  # of the estimated size has to be free on the disk


class Piece(NamedTuple):
    """A rank's rows of a tensor."""

    rows: Tensor
    start: int
    shape: list[int]  # of the whole tensor


class Save:
    """A checkpoint on its way. All ranks make one, `write` it (in a thread if they like), and `commit` it together."""

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        parallel: SingleDevice,
        snapshot: bool = False,
    ):
        """`state` is for JSON. `snapshot` copies the tensors, so that training may go on while they are written.

        Raises RunError when the disk has too little room.
        """
        self.folder, self.parallel = folder, parallel
        tensors, numbers = _optimizer_state(model, optimizer)
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        self.parts = {"model": _pieces(trained, snapshot), "optimizer": _pieces(tensors, snapshot)}
        self.rng = _rng_state()
        self.state = state | {"optimizer": numbers, "world_size": parallel.world_size}
        self.error: tuple[int | None, str] | None = None  # number and reason
        self.files: dict[str, dict] = {}
        self.thread: threading.Thread | None = None
        self._check_room()
        self.temporary = Path(parallel.run_on_rank0(self._make_temporary))

    def write(self) -> None:
        """Writes this rank's files; an error is kept for `commit`."""
        rank = self.parallel.rank
        try:
            for part, pieces in self.parts.items():
                tensors = {name: piece.rows.contiguous() for name, piece in pieces.items()}
                self._write_file(f"{part}-{rank}.safetensors", tensors)
            self._write_file(f"rng-{rank}.safetensors", self.rng)
        except (OSError, SafetensorError) as error:
            self.error = getattr(error, "errno", None), f"rank {rank}: {reason(error)}"

    def start(self) -> None:
        """`write` in a thread; `running` tells when it is done."""
        self.thread = threading.Thread(target=self.write, name="save")
        self.thread.start()

    @property
    def running(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def commit(self) -> None:
        """Makes the checkpoint one that counts. Raises the same RunError on all ranks when one could not write."""
        if self.thread is not None:
            self.thread.join()
        index = {
            part: {name: [p.start, p.start + p.rows.shape[0] if p.shape else 1, p.shape] for name, p in pieces.items()}
            for part, pieces in self.parts.items()
        }
        told = self.parallel.gather({"error": self.error, "files": self.files, "index": index})
        self.parallel.run_on_rank0(lambda: self._commit(told))

    def _commit(self, told: list[dict]) -> None:
        try:
            if failed := [one["error"] for one in told if one["error"]]:
                raise OSError(failed[0][0], "; ".join(text for _, text in failed))
            for one in told:
                self.files |= one["files"]
            for name, content in (("index", _join_indices(told)), ("state", self.state)):
                self._write_json(name, content)
            failpoint("save.manifest")
            versions = {"torch": torch.__version__}
            self._write_json("manifest", {"files": self.files, "step": self.state["step"], "versions": versions})
            failpoint("save.rename")
            replace_folder(self.temporary, self.folder)
            failpoint("save.renamed")
        except (OSError, SafetensorError) as error:
            shutil.rmtree(self.temporary, ignore_errors=True)
            raise RunError(f"{self.folder}: cannot be written: {reason(error)}", write_error_code(error)) from None

    def _make_temporary(self) -> str:
        temporary = sibling(self.folder, "tmp")
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise RunError(f"{self.folder}: cannot be written: {reason(error)}", write_error_code(error)) from None
        return str(temporary)

    def _check_room(self) -> None:
        size = sum(p.rows.nbytes for pieces in self.parts.values() for p in pieces.values())
        needed = SPARE * sum(self.parallel.gather(size))
        place = next(parent for parent in self.folder.parents if parent.exists())
        free = -self.parallel.max(-shutil.disk_usage(place).free)
        if free < needed:
            raise RunError(
                f"{self.folder}: the disk has {free / 1e6:,.0f} MB free, a checkpoint needs {needed / 1e6:,.0f} MB; "
                "make room, or lower keep_checkpoints. The checkpoints that are there are untouched.",
                "no-space",
            )

    def _write_file(self, name: str, tensors: dict[str, Tensor]) -> None:
        file = self.temporary / name
        failpoint("save.write", file)
        save_file(tensors, file)
        fsync(file)
        self.files[name] = fingerprint(file)
        failpoint("save.written", file)

    def _write_json(self, name: str, content: dict) -> None:
        file = self.temporary / f"{name}.json"
        file.write_text(json.dumps(content, indent=1))
        fsync(file)
        self.files[file.name] = fingerprint(file)


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, parallel: SingleDevice
) -> dict[str, Any]:
    """Restores what `Save` wrote into model and optimizer, each rank its own rows; returns the state.

    The random number generators are restored by `restore_rng`, when nothing will draw from them any more before
    the first step. The folder was verified before. Raises RunDirError when it is of another model.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with _contradictions_refused(folder), torch.no_grad():
        reader = _Reader(folder)
        state = _checked_state(reader, model)
        for name, parameter in parameters.items():
            reader.read_into(parameter, "model", name)
        _load_optimizer_state(reader, parameters, optimizer, state.pop("optimizer"))
    parallel.reshard(model)
    return state


def check_checkpoint(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Return the state of a checkpoint. The model may be on the meta device.

    Raises RunDirError when it holds other tensors than the model trains, or its files contradict one another.
    """
    with _contradictions_refused(folder):
        return _checked_state(_Reader(folder), model)


def _checked_state(reader: "_Reader", model: nn.Module) -> dict[str, Any]:
    shapes = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    if {name: entry["shape"] for name, entry in reader.index["model"].items()} != shapes:
        raise RunDirError(
            f"{reader.folder}: holds other parameters than this model trains; were the model or freeze_layers changed?",
            "mismatch",
        )
    for part, entries in reader.index.items():
        for name in entries:
            reader.pieces(part, name)
    return json.loads((reader.folder / "state.json").read_text())


@contextlib.contextmanager
def _contradictions_refused(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, RunDirError):
            raise
        raise RunDirError(
            f"{folder}: its files contradict one another ({reason(error)}). Remove it", "damaged-file"
        ) from None


def restore_rng(folder: Path, parallel: SingleDevice) -> None:
    """This rank's generators; with another number of ranks than before, new ones that no rank shares."""
    state = json.loads((folder / "state.json").read_text())
    if state["world_size"] != parallel.world_size:
        torch.manual_seed(torch.initial_seed() + state["step"])
        return
    saved = load_file(folder / f"rng-{parallel.rank}.safetensors")
    torch.set_rng_state(saved["cpu"])
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])


class _Reader:
    """Rows of the tensors of a checkpoint."""

    def __init__(self, folder: Path):
        self.index = json.loads((folder / "index.json").read_text())
        self.folder, self.files = folder, {}

    def read_into(self, tensor: Tensor, part: str, name: str) -> None:
        """Fills this rank's rows of a tensor."""
        rows, start = local_shard(tensor)
        pieces = self.pieces(part, name)
        if not rows.shape:
            rows.copy_(self._open(pieces[0][0]).get_tensor(name))
            return
        for file, first, last in pieces:
            low, high = max(start, first), min(start + len(rows), last)
            if low < high:
                found = self._open(file).get_slice(name)[low - first : high - first]
                rows[low - start : high - start].copy_(found)

    def dtype(self, part: str, name: str) -> torch.dtype:
        return self._open(self.index[part][name]["pieces"][0][0]).get_slice(name)[:0].dtype

    def full_tensor(self, part: str, name: str) -> Tensor:
        pieces = [self._open(file).get_tensor(name) for file, *_ in self.pieces(part, name)]
        return torch.cat(pieces) if self.index[part][name]["shape"] else pieces[0]

    def pieces(self, part: str, name: str) -> list[tuple[str, int, int]]:
        """(file, first row, row after the last) of each piece, in order.

        Raises RunDirError unless they are all rows of the tensor, each once, and as large in the files as said:
        `copy_` would broadcast a piece that is too small, and rows that no piece has would keep their values.
        """
        entry, pieces, end = self.index[part][name], [], 0
        for file, first, last in sorted(entry["pieces"], key=lambda piece: piece[1]):
            shape = [last - first, *entry["shape"][1:]] if entry["shape"] else []
            found = list(self._open(file).get_slice(name).get_shape())
            if found != shape or first != end:
                raise RunDirError(
                    f"{self.folder / file}: {name} is {found} from row {end} on, and index.json says {shape} from row "
                    f"{first} on. The checkpoint cannot be used; remove it",
                    "damaged-file",
                )
            pieces.append((file, first, last))
            end = last
        if end != (entry["shape"][0] if entry["shape"] else 1):
            raise RunDirError(
                f"{self.folder / 'index.json'}: {name} lacks rows from {end} on. Remove the checkpoint", "damaged-file"
            )
        return pieces

    def _open(self, name: str):
        if Path(name).name != name:
            raise RunDirError(
                f"{self.folder / 'index.json'}: names {name!r}, which is outside of the checkpoint", "damaged-file"
            )
        if name not in self.files:
            self.files[name] = safe_open(self.folder / name, framework="pt")
        return self.files[name]


def _pieces(tensors: dict[str, Tensor], snapshot: bool) -> dict[str, Piece]:
    pieces = {}
    for name, tensor in tensors.items():
        rows, start = local_shard(tensor)
        if writes(tensor) and (rows.numel() or not tensor.numel()):
            rows = rows.detach()
            pieces[name] = Piece(rows.to("cpu", copy=True) if snapshot else rows, start, list(tensor.shape))
    return pieces


def _join_indices(told: list[dict]) -> dict[str, dict]:
    """What all ranks wrote -> {part: {tensor: {shape, pieces: [[file, first row, row after the last], ...]}}}."""
    joined: dict[str, dict] = {"model": {}, "optimizer": {}}
    for rank, one in enumerate(told):
        for part, entries in one["index"].items():
            for name, (start, stop, shape) in entries.items():
                entry = joined[part].setdefault(name, {"shape": shape, "pieces": []})
                entry["pieces"].append([f"{part}-{rank}.safetensors", start, stop])
    return joined


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict]:
    names = {id(p): name for name, p in model.named_parameters()}
    tensors, numbers = {}, {}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            kept = tensors if isinstance(value, Tensor) else numbers
            kept[f"{names[id(parameter)]}/{key}"] = value
    return tensors, numbers


def _load_optimizer_state(
    reader: _Reader, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, numbers: dict
) -> None:
    on_device = optimizer.param_groups[0].get("fused")  # a fused optimizer counts its steps on the device
    optimizer.state.clear()
    for name, entry in reader.index["optimizer"].items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters[parameter_name]
        if entry["shape"] == list(parameter.shape):
            value = torch.empty_like(parameter.detach(), dtype=reader.dtype("optimizer", name))
            reader.read_into(value, "optimizer", name)
        else:
            value = reader.full_tensor("optimizer", name)
            value = value.to(parameter.device) if on_device else value
        optimizer.state[parameter][key] = value
    for name, value in numbers.items():
        parameter_name, _, key = name.rpartition("/")
        optimizer.state[parameters[parameter_name]][key] = value


def _rng_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
