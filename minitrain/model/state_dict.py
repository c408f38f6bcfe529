"""Load weights that replace those of a model: a state dict in a file, or the files of a model's folder."""

import functools
import pickle
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minitrain.errors import ConfigError
from minitrain.io.paths import INDEX, shard_names

from .diagnostics import first_line


def load_archive(model: nn.Module, path: Path) -> None:
    """Replace the weights of a model with those of an archive.

    Raises:
        ConfigError: The archive cannot be read, or is from another model.
    """
    model.load_state_dict(read_archive(model, path), strict=False)


def read_archive(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """Return the tensors of an archive by their names in `model`; tied ones can be missing.

    A `.pt` file can have its state dict under the key `state`. Other objects are never unpickled.

    Raises:
        ConfigError: The archive cannot be read, or is from another model.
    """
    state: dict[str, Tensor] = {}
    try:
        for file in archive_files(path):
            if file.suffix == ".safetensors":
                state |= load_file(file)
            else:
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                state |= content.get("state", content)
    except (AttributeError, pickle.UnpicklingError):
        reason = "it is not a state dict. Save a mapping of names to tensors"
        raise ConfigError(f"model.archive: {path} cannot be loaded: {reason}.", "unreadable") from None
    except Exception as error:
        raise ConfigError(f"model.archive: {path} cannot be loaded: {first_line(error)}", "unreadable") from None
    state = _rename_keys(model, state)
    if (other := getattr(model, "other_tensors", None)) is not None:
        state = {other.own_name(name): tensor for name, tensor in state.items()}
        replaced = {name: functools.partial(torch.clone, state.pop(name)) for name in list(state) if other.has(name)}
        other.sources = replaced or other.sources
    _check_keys(model, state, path)
    return state


def archive_files(path: Path) -> list[Path]:
    """Return the files of an archive: the file itself, or those of a model's folder; empty if there are none."""
    if path.is_file():
        return [path] if path.suffix in (".pt", ".bin", ".safetensors") else []
    if (path / INDEX).is_file():
        return [path / name for name in shard_names(path / INDEX)]
    single = path / "model.safetensors"
    return [single] if single.is_file() else []


def _rename_keys(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of older versions of transformers to those of `model`, and drop buffers that it no longer has."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    old_buffers = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]
    expected = model.state_dict()
    tensors = {str(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    renamed = {rename_source_key(name, renamings, [])[0]: tensor for name, tensor in tensors.items()}
    return {
        name: tensor
        for name, tensor in renamed.items()
        if name in expected or not any(re.search(pattern, name) for pattern in old_buffers)
    }


def _check_keys(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = [name for name in expected if name not in state and name not in tied]
    unexpected = [name for name in state if name not in expected]
    if missing or unexpected:
        raise ConfigError(
            f"model.archive: {path} does not match {type(model).__name__}: "
            f"missing {missing[:3]}, unexpected {unexpected[:3]}. Use an archive of the same model.",
            "mismatch",
        )
    for name, tensor in state.items():
        if tuple(tensor.shape) != expected[name]:
            raise ConfigError(
                f"model.archive: {name} in {path} must have the shape {list(expected[name])}, "
                f"got {list(tensor.shape)}.",
                "mismatch",
            )
