"""Crash-safe checkpoints: written under a temporary name, flushed, hashed, then renamed.

    checkpoints/step-100/   model-0.safetensors      rank 0's shards of the trained parameters
                            optimizer-0.safetensors  rank 0's shards of the optimizer state, `parameter/state name`
                            reference-0.safetensors  rank 0's shards of the reference, if it moves
                            rng-0.safetensors        rank 0's random number generators
                            ...                      the same for rank 1, 2, ...
                            index.json               shape of each tensor, and the file of each of its shards
                            state.json               step, position in the data, loss scale, options
                            manifest.json            size and SHA-256 of each file; written last

Any number of ranks can load a checkpoint, each only its own shards. Tensors are safetensors, the rest is JSON; there is
no pickle.
"""

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from minitrain.distributed.parallel import SingleDevice, local_shard, writes
from minitrain.errors import RunDirError, RunError, write_error_code
from minitrain.io.system import fsync
from minitrain.io.tensor_files import save_file

from .atomic_dir import fingerprint, reason, replace_folder, temp_sibling
from .failpoints import failpoint
from .optim_state import OF_RANK, load_state, named_state

DATA = "data.safetensors"
SPARE = 1.2  # multiple of the estimated size that must be free on the disk


class Shard(NamedTuple):
    """A rank's part of a tensor: the rows from `start` on."""

    rows: Tensor
    start: int
    shape: list[int]  # of the full tensor


class Save:
    """A checkpoint being written. Every rank creates one, calls `write` (or `start`, in a thread), then `commit`."""

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        parallel: SingleDevice,
        snapshot: bool = False,
        data: dict[str, Tensor] | None = None,
        reference: Sequence[Tensor] | None = None,
    ):
        """
        Args:
            state: Values for state.json.
            snapshot: Whether to copy the tensors, so that training can continue while they are written.
            data: Tensors that are the same on all ranks, for `data.safetensors`.
            reference: This rank's shards of another value of each trained parameter.

        Raises:
            RunError: If the disk has too little free space.
        """
        self.folder, self.parallel = folder, parallel
        tensors, numbers = named_state(dict(model.named_parameters()), optimizer, parallel.rank)
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        self.shards = {"model": _shards(trained, snapshot), "optimizer": _shards(tensors, snapshot)}
        if reference is not None:
            values, written = dict(zip(trained, reference, strict=True)), self.shards["model"]
            self.shards["reference"] = {
                name: shard._replace(rows=values[name].to("cpu", copy=True) if snapshot else values[name])
                for name, shard in written.items()
            }
        self.rng, self.data = _rng_state(), data
        self.state = state | {"optimizer": numbers, "world_size": parallel.world_size}
        self.error: tuple[int | None, str] | None = None  # errno and message
        self.files: dict[str, dict] = {}
        self.thread: threading.Thread | None = None
        self._check_free_space()
        self.temporary = Path(parallel.run_on_rank0(self._make_temporary))

    def write(self) -> None:
        """Write this rank's files. `commit` raises an error of it."""
        rank = self.parallel.rank
        try:
            for part, shards in self.shards.items():
                tensors = {name: shard.rows.contiguous() for name, shard in shards.items()}
                self._write_file(f"{part}-{rank}.safetensors", tensors)
            self._write_file(f"rng-{rank}.safetensors", self.rng)
            if self.data and rank == 0:
                self._write_file(DATA, self.data)
        except (OSError, SafetensorError) as error:
            self.error = getattr(error, "errno", None), f"rank {rank}: {reason(error)}"

    def start(self) -> None:
        """Call `write` in a thread. `running` is true until it returns."""
        self.thread = threading.Thread(target=self.write, name="save")
        self.thread.start()

    @property
    def running(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def commit(self) -> None:
        """Complete the checkpoint. Raise the same RunError on all ranks if one of them could not write."""
        if self.thread is not None:
            self.thread.join()
        index = {
            part: {name: [s.start, s.start + s.rows.shape[0] if s.shape else 1, s.shape] for name, s in shards.items()}
            for part, shards in self.shards.items()
        }
        ranks = self.parallel.gather({"error": self.error, "files": self.files, "index": index})
        self.parallel.run_on_rank0(lambda: self._commit(ranks))

    def _commit(self, ranks: list[dict]) -> None:
        """Write the JSON files and rename the directory, given error, files and index of each rank."""
        try:
            if errors := [rank["error"] for rank in ranks if rank["error"]]:
                raise OSError(errors[0][0], "; ".join(message for _, message in errors))
            for rank in ranks:
                self.files |= rank["files"]
            for name, content in (("index", _join_indices(ranks)), ("state", self.state)):
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
        temporary = temp_sibling(self.folder, "tmp")
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise RunError(f"{self.folder}: cannot be written: {reason(error)}", write_error_code(error)) from None
        return str(temporary)

    def _check_free_space(self) -> None:
        size = sum(shard.rows.nbytes for shards in self.shards.values() for shard in shards.values())
        needed = SPARE * sum(self.parallel.gather(size))
        existing = next(parent for parent in self.folder.parents if parent.exists())
        free = -self.parallel.max(-shutil.disk_usage(existing).free)
        if free < needed:
            raise RunError(
                f"{self.folder}: a checkpoint needs {needed / 1e6:,.0f} MB, and the disk has {free / 1e6:,.0f} MB "
                "free. Free up space, or lower keep_checkpoints. Existing checkpoints are unchanged.",
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
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parallel: SingleDevice,
    reference: Sequence[Tensor] | None = None,
) -> dict[str, Any]:
    """Load a verified checkpoint into model and optimizer, each rank its own shards.

    `restore_rng` restores the random number generators later, when nothing draws from them before the first step.

    Returns:
        The state that `Save` got.

    Raises:
        RunDirError: If the checkpoint is of another model.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with _reporting_damage(folder), torch.no_grad():
        reader = _Reader(folder)
        state = _checked_state(reader, model)
        _check_ranks(reader, state["world_size"], parallel.world_size)
        _load_optimizer_state(reader, parameters, optimizer, state.pop("optimizer"), parallel.rank)
        for (name, parameter), value in zip(parameters.items(), reference or ()):
            reader.read_into(parameter, "reference", name)
            value.copy_(local_shard(parameter)[0])
        for name, parameter in parameters.items():  # last, because the optimizer has changed them
            reader.read_into(parameter, "model", name)
    parallel.reshard(model)
    return state


def check_checkpoint(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Return the state of a checkpoint. The model may be on the meta device.

    Raises:
        RunDirError: If its parameters are not those that the model trains, or its files are inconsistent.
    """
    with _reporting_damage(folder):
        return _checked_state(_Reader(folder), model)


def _checked_state(reader: "_Reader", model: nn.Module) -> dict[str, Any]:
    shapes = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    if {name: entry["shape"] for name, entry in reader.index["model"].items()} != shapes:
        raise RunDirError(
            f"{reader.folder}: its parameters are not those that this model trains. Restore the options of the model, "
            "such as freeze_layers, or use another exp_name.",
            "mismatch",
        )
    for part, entries in reader.index.items():
        for name in entries:
            reader.shards(part, name)
    return json.loads((reader.folder / "state.json").read_text(encoding="utf-8"))


@contextlib.contextmanager
def _reporting_damage(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, RunDirError):
            raise
        raise RunDirError(
            f"{folder}: its files are inconsistent ({reason(error)}). Remove the checkpoint.", "damaged-file"
        ) from None


def restore_rng(folder: Path, parallel: SingleDevice) -> None:
    """Restore this rank's generators or, if the number of ranks has changed, seed them differently on each rank."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state["world_size"] != parallel.world_size:
        torch.manual_seed(torch.initial_seed() + state["step"])
        return
    saved = load_file(folder / f"rng-{parallel.rank}.safetensors")
    torch.set_rng_state(saved["cpu"])
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])


class _Reader:
    """Reads shards of the tensors of a checkpoint."""

    def __init__(self, folder: Path):
        self.index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self.folder, self.files = folder, {}

    def read_into(self, tensor: Tensor, part: str, name: str) -> None:
        """Load this rank's rows of a tensor into `tensor`."""
        rows, start = local_shard(tensor)
        shards = self.shards(part, name)
        if not rows.shape:
            rows.copy_(self._open(shards[0][0]).get_tensor(name))
            return
        for file, first, stop in shards:
            low, high = max(start, first), min(start + len(rows), stop)
            if low < high:
                stored = self._open(file).get_slice(name)[low - first : high - first]
                rows[low - start : high - start].copy_(stored)

    def holds_floats(self, part: str, name: str) -> bool:
        """Return whether a tensor is of floats; `copy_` would convert the codes of quantized ones."""
        return "F" in self._open(self.index[part][name]["pieces"][0][0]).get_slice(name).get_dtype()

    def shards(self, part: str, name: str) -> list[tuple[str, int, int]]:
        """Return (file, first row, row after the last) of each shard, in order.

        Raises:
            RunDirError: If they do not cover each row once, or have other shapes in the files: `copy_` would broadcast
                a shard that is too small, and rows without a shard would keep their values.
        """
        entry, shards, end = self.index[part][name], [], 0
        for file, first, stop in sorted(entry["pieces"], key=lambda shard: shard[1]):
            shape = [stop - first, *entry["shape"][1:]] if entry["shape"] else []
            stored = list(self._open(file).get_slice(name).get_shape())
            if stored != shape or first != end:
                raise RunDirError(
                    f"{self.folder / file}: {name} has shape {stored} from row {end} on, and index.json says {shape} "
                    f"from row {first} on. Remove the checkpoint.",
                    "damaged-file",
                )
            shards.append((file, first, stop))
            end = stop
        if end != (entry["shape"][0] if entry["shape"] else 1):
            raise RunDirError(
                f"{self.folder / 'index.json'}: {name} lacks rows from {end} on. Remove the checkpoint.", "damaged-file"
            )
        return shards

    def _open(self, name: str):
        if Path(name).name != name:
            raise RunDirError(
                f"{self.folder / 'index.json'}: lists {name!r}, outside of the checkpoint. Remove the checkpoint.",
                "damaged-file",
            )
        if name not in self.files:
            self.files[name] = safe_open(self.folder / name, framework="pt")
        return self.files[name]


def _shards(tensors: dict[str, Tensor], snapshot: bool) -> dict[str, Shard]:
    """Return the shards that this rank writes."""
    shards = {}
    for name, tensor in tensors.items():
        rows, start = local_shard(tensor)
        if (writes(tensor) or OF_RANK in name) and (rows.numel() or not tensor.numel()):
            rows = rows.detach()
            shards[name] = Shard(rows.to("cpu", copy=True) if snapshot else rows, start, list(tensor.shape))
    return shards


def _join_indices(ranks: list[dict]) -> dict[str, dict]:
    """Return index.json, {part: {tensor: {shape, pieces: [[file, first row, row after the last], ...]}}}."""
    joined: dict[str, dict] = {part: {} for part in ranks[0]["index"]}
    for rank, written in enumerate(ranks):
        for part, entries in written["index"].items():
            for name, (start, stop, shape) in entries.items():
                entry = joined[part].setdefault(name, {"shape": shape, "pieces": []})
                entry["pieces"].append([f"{part}-{rank}.safetensors", start, stop])
    return joined


def _load_optimizer_state(
    reader: _Reader, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, numbers: dict, rank: int
) -> None:
    saved = reader.index["optimizer"]
    unread = {name for name in saved if OF_RANK not in name or name.endswith(f"{OF_RANK}{rank}")}

    def read(name: str, value: Tensor) -> bool:
        if name not in saved:
            return False
        same_type = reader.holds_floats("optimizer", name) == value.is_floating_point()
        if saved[name]["shape"] != list(value.shape) or not same_type:
            raise RunDirError(
                f"{reader.folder}: {name} has another shape or type than the optimizer's. Restore optimizer and "
                "optimizer_args.",
                "mismatch",
            )
        reader.read_into(value, "optimizer", name)
        unread.discard(name)
        return True

    load_state(parameters, optimizer, rank, numbers, read)
    if unread:
        raise RunDirError(
            f"{reader.folder}: the optimizer has no {min(unread)}. Restore optimizer and optimizer_args.",
            "mismatch",
        )


def _check_ranks(reader: _Reader, saved: int, now: int) -> None:
    """Raise RunDirError if the state belongs to the rows of ranks that have changed."""
    if saved != now and any(OF_RANK in name for name in reader.index["optimizer"]):
        raise RunDirError(
            f"{reader.folder}: its quantized optimizer state is that of {saved} processes, got {now}. Resume with "
            f"{saved} processes.",
            "mismatch",
        )


def _rng_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
