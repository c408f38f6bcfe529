"""Write safetensors files with ordinary permissions."""

from pathlib import Path

from safetensors import torch as safetensors
from torch import Tensor


def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a file with the permissions of the umask.

    safetensors writes a temporary file that only its owner can read, and renames it.
    """
    path.touch()
    mode = path.stat().st_mode
    safetensors.save_file(tensors, path, metadata)
    path.chmod(mode)
