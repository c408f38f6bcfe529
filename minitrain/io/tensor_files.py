"""Write safetensors files: with ordinary permissions, or piece by piece."""

import json
import math
from pathlib import Path
from typing import BinaryIO

from safetensors import torch as safetensors
from torch import Tensor

ITEM_SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U8": 1}


def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a file with the permissions of the umask.

    safetensors writes a temporary file that only its owner can read, and renames it.
    """
    path.touch()
    mode = path.stat().st_mode
    safetensors.save_file(tensors, path, metadata)
    path.chmod(mode)


def start_file(file: BinaryIO, tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str]) -> dict[str, int]:
    """Write the header of a file, and extend the file with zeros to its full size.

    Args:
        tensors: The dtype and the shape of each tensor, by its name.

    Returns:
        The offset in the file at which each tensor starts.
    """
    header, end = {"__metadata__": metadata}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + ITEM_SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    data = file.tell()
    file.truncate(data + end)
    return {name: data + header[name]["data_offsets"][0] for name in tensors}
