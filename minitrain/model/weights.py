"""Read the rows of weights that a rank needs from a model's files, and write weights one tensor at a time."""

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from minitrain.io.paths import INDEX, shard_names
from minitrain.io.tensor_files import save_file

from . import token_rows
from .diagnostics import describe_unused, log_model_warnings
from .dtypes import DtypePlan

FLOATS = ("F64", "F32", "F16", "BF16")  # floating-point dtypes of safetensors
SHARD_BYTES = 4 << 30  # maximum size of a file of a saved model, and of the memory for saving


class Weights:
    """Rows of the tensors of a model by parameter name, read from files on demand.

    Args:
        sources: Name -> tensor or safetensors slice; `source[start:stop]` are its rows.
        sizes: Name -> shape.
    """

    def __init__(self, sources: dict[str, Any], sizes: dict[str, list[int]]):
        self.sources, self.sizes = sources, sizes

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of a tensor."""
        source = self.sources[name]
        rows = source[start:stop]
        # A view would keep all of a tensor in memory. Rows of a file are pages of it.
        return rows.clone() if isinstance(source, Tensor) and len(rows) < len(source) else rows

    def replace(self, tensors: dict[str, Tensor]) -> None:
        """Replace tensors of the files."""
        self.sources |= tensors
        self.sizes |= {name: list(tensor.shape) for name, tensor in tensors.items()}

    def alias(self, name: str, known: str) -> None:
        """Add `name` as another name of the tensor `known`."""
        self.sources[name], self.sizes[name] = self.sources[known], self.sizes[known]


class LowRankDifference:
    """Rows of source - left @ right."""

    def __init__(self, source: Any, left: Tensor, right: Tensor):
        self.source, self.left, self.right = source, left, right

    def __getitem__(self, rows: slice) -> Tensor:
        source = self.source[rows]
        return (source.float() - self.left[rows] @ self.right).to(source.dtype)


def open_weights(name: str, revision: str | None, model: nn.Module) -> Weights | None:
    """Open the safetensors files of a model; return None if keys, shapes or dtypes differ from `model`."""
    files = _renamed_files(model, open_files(weight_files(name, revision)))
    sources, sizes, used = {}, {}, {}
    for parameter, value in model.named_parameters():
        key = parameter if parameter in files else parameter.removeprefix(f"{model.base_model_prefix}.")
        if key not in files:
            return None
        used[parameter] = key
        sources[parameter] = files[key].slice()
        sizes[parameter] = sources[parameter].get_shape()
        if sizes[parameter][1:] != list(value.shape[1:]) or sources[parameter].get_dtype() not in FLOATS:
            return None
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # name -> the name that it is tied to
    for parameter in tied.keys() & files.keys():
        key = used.get(tied[parameter])
        if key is None or not torch.equal(files[parameter].tensor(), files[key].tensor()):
            return None  # tied in the config, but different in the files: transformers loads both
    for buffer, value in model.named_buffers():
        if buffer in files:
            value.copy_(files[buffer].tensor())
    log_model_warnings(name, describe_unused(_unused(files.keys(), set(used.values()), model)))
    return Weights(sources, sizes)


class _FileTensor(NamedTuple):
    """A tensor in an open safetensors file."""

    file: Any
    key: str

    def slice(self) -> Any:
        return self.file.get_slice(self.key)

    def tensor(self) -> Tensor:
        return self.file.get_tensor(self.key)


def _renamed_files(model: nn.Module, files: dict[str, Any]) -> dict[str, _FileTensor]:
    """Return the tensors of files by their names in the model; empty if transformers does more than rename them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model, add_legacy=False)
    if not all(isinstance(entry, WeightRenaming) for entry in mapping):
        return {}
    renamed = {rename_source_key(key, mapping, [])[0]: _FileTensor(file, key) for key, file in files.items()}
    model._weight_conversions = [entry for entry in mapping if entry.was_used()]  # they restore the names on saving
    return renamed


def parameters_on(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which new parameters take no memory if `device` is the meta device."""
    return parameters_on_meta() if device.type == "meta" else contextlib.nullcontext()


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within the context, new parameters are on the meta device; buffers are real."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a tied parameter must stay the same object
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def full_tensors(model: nn.Module, full_tensor: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the unsharded value of each tensor to save, tied ones once.

    With an adapter, these are the tensors of its files. Trained rows are merged into their weight.

    Args:
        model: The transformers model.
        full_tensor: Returns the unsharded value of a tensor.
    """
    adapter = getattr(model, "adapter", None)
    if adapter is None:
        tensors = state_tensors(model)
    else:
        all_parameters = dict(model.named_parameters(remove_duplicate=False))
        tensors = {name: all_parameters[name] for name in adapter.names(model)}
    for name, tensor in tensors.items():
        full = full_tensor(tensor.detach())
        module = model.get_submodule(name.rpartition(".")[0])
        if name.endswith(".weight") and token_rows.has_rows(module):
            full = token_rows.put_rows(module, full, full_tensor(module.token_rows.detach()))
        yield name, full


def save_weights(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], folder: Path, dtype: torch.dtype) -> None:
    """Save the tensors of a model in files of up to `SHARD_BYTES`, with at most one file in memory.

    Args:
        model: The transformers model.
        tensors: Name and value of each tensor, in the order of `full_tensors`.
        folder: Folder for the files.
        dtype: Dtype of the saved weights; see `DtypePlan` for exceptions.
    """
    plan = DtypePlan(model, dtype)
    sizes = [tensor.numel() * plan(name, tensor).itemsize for name, tensor in state_tensors(model).items()]
    counts, stream, files = _count_per_file(sizes), iter(tensors), {}
    for number, count in enumerate(counts, 1):
        file_tensors = {}
        for name, tensor in itertools.islice(stream, count):
            file_tensors[name] = tensor.to("cpu", plan(name, tensor)).contiguous()
        file = "model.safetensors" if len(counts) == 1 else f"model-{number:05}-of-{len(counts):05}.safetensors"
        save_file(file_tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(file_tensors, file)
    if len(counts) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def add_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Add tensors to the saved weights of a model, in more files, with at most one file in memory."""
    files = shard_names(folder / INDEX) if (folder / INDEX).is_file() else ["model.safetensors"]
    files += [_save_more(file_tensors, folder, len(files) + i) for i, file_tensors in enumerate(by_file(tensors))]
    index = {"metadata": {"total_size": 0}, "weight_map": {}}
    for number, file in enumerate(files, 1):
        path = folder / f"model-{number:05}-of-{len(files):05}.safetensors"
        (folder / file).rename(path)
        for key, opened in open_files([path]).items():
            index["weight_map"][key] = path.name
            index["metadata"]["total_size"] += opened.get_tensor(key).nbytes
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def by_file(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of each file, up to `SHARD_BYTES` or one tensor."""
    file_tensors, file_bytes = {}, 0
    for name, tensor in tensors:
        if file_tensors and file_bytes + tensor.nbytes > SHARD_BYTES:
            yield file_tensors
            file_tensors, file_bytes = {}, 0
        file_tensors[name], file_bytes = tensor.contiguous(), file_bytes + tensor.nbytes
    yield file_tensors


def _save_more(tensors: dict[str, Tensor], folder: Path, number: int) -> str:
    """Save one more file, and return its name."""
    name = f"other-{number}.safetensors"
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return name


def _count_per_file(sizes: list[int]) -> list[int]:
    """Return how many tensors go into each file."""
    counts, file_bytes = [0], 0
    for size in sizes:
        if counts[-1] and file_bytes + size > SHARD_BYTES:
            counts.append(0)
            file_bytes = 0
        counts[-1] += 1
        file_bytes += size
    return counts


def allocate(module: nn.Module, device: torch.device) -> None:
    """Move a module from the meta device to another one, without values. Tied parameters stay tied."""
    made: dict[int, nn.Parameter] = {}
    for one in module.modules():
        for name, parameter in one._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty_like(parameter, device=device)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=False)
                one._parameters[name] = made[id(parameter)]
        one._buffers.update({name: None if b is None else b.to(device) for name, b in one._buffers.items()})


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a model, with tied parameters once under the name that transformers saves."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    owners: dict[int, str] = {}
    all_parameters = model.named_parameters(remove_duplicate=False)
    parameters = {name: p for name, p in all_parameters if not name.endswith(f".{token_rows.NAME}")}
    for name, parameter in parameters.items():
        if id(parameter) not in owners or owners[id(parameter)] in tied:
            owners[id(parameter)] = name
    names = set(owners.values())
    buffers = dict(model.named_buffers())
    chosen = {name: tensor for name, tensor in parameters.items() if name in names}
    return chosen | {name: buffers[name] for name in model.state_dict() if name in buffers}


def weight_files(name: str, revision: str | None) -> list[Path]:
    """Return the safetensors files of a model; empty if it has none."""
    from transformers.utils.hub import cached_file

    def find(file: str) -> Path | None:
        path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        return Path(path) if path else None

    index = find(INDEX)
    if index is not None:
        return [find(file) for file in shard_names(index)]
    single = find("model.safetensors")
    return [single] if single else []


def open_files(paths: Iterable[Path]) -> dict[str, Any]:
    """Return the open safetensors file of each key."""
    opened = [safe_open(path, framework="pt") for path in paths]
    return {key: file for file in opened for key in file.keys()}  # noqa: SIM118 (not a dict)


def _unused(keys: Collection[str], used: set[str], model: nn.Module) -> list[str]:
    """Return the keys of a model's files that the model does not have, except those of older versions."""
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    unused = set(keys) - used - set(tied) - dict(model.named_buffers()).keys()
    if other := getattr(model, "other_tensors", None):
        unused = {key for key in unused if not other.has(key)}
    return [key for key in unused if not any(re.search(pattern, key) for pattern in ignored)]


def find_gaps(folder: Path | None, model: nn.Module) -> dict[str, list]:
    """Return the missing, mismatched and unexpected keys of a local model's safetensors files.

    The format is the loading info of transformers. Only the headers are read. All lists are empty without a folder,
    or if transformers converts the model's files.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import rename_source_key

    gaps = {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": []}
    files = weight_files(str(folder), None) if folder and folder.is_dir() else []
    if not files or get_model_conversion_mapping(model, add_legacy=False):
        return gaps
    shapes, mapping = {}, get_model_conversion_mapping(model)
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                shapes[rename_source_key(key, mapping, [])[0]] = file.get_slice(key).get_shape()
    tied, used = set(getattr(model, "all_tied_weights_keys", None) or ()), set()
    for name, parameter in model.named_parameters():
        key = name if name in shapes else name.removeprefix(f"{model.base_model_prefix}.")
        used.add(key)
        if key in shapes and shapes[key] != list(parameter.shape):
            gaps["mismatched_keys"].append((name, tuple(shapes[key]), tuple(parameter.shape)))
        elif key not in shapes and name not in tied:
            gaps["missing_keys"].append(name)
    gaps["unexpected_keys"] = _unused(shapes.keys(), used, model)
    return gaps
