"""Fingerprints of a model's files, for caches of its outputs and for checkpoints.

Models of up to `MAX_FULL_BYTES` are hashed in full, which takes a second or two. For larger models, the hash covers the
header and `N_SAMPLES` ranges of every tensor, about 260 kB per tensor: 80 MB for a model of 15 GB with 300 tensors. A
single changed number in a sampled tensor can be missed; training changes nearly all of them.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from minitrain.config.python_objects import find_object
from minitrain.config.sections import ModelConfig

from .adapter_config import CONFIG_FILE
from .given import is_built_here
from .state_dict import archive_files

MAX_FULL_BYTES = 1 << 30  # total size of all files
N_SAMPLES, SAMPLE_BYTES = 64, 4096  # per tensor, per sample
WEIGHTS = (".safetensors", ".bin", ".pt")


def model_fingerprint(config: ModelConfig) -> list[str]:
    """Return a line with a hash for each file of a model, its adapter and its archive."""
    folders = [_folder(config), *([Path(config.adapter)] if config.adapter else [])]
    files = [file for folder in folders if folder for file in sorted(folder.glob("*"))]
    files = [file for file in files if file.suffix in WEIGHTS or file.name in ("config.json", CONFIG_FILE)]
    files += archive_files(Path(config.archive)) if config.archive else []
    given = [config.name_or_path] if find_object(config.name_or_path) else []
    is_sampled = sum(file.stat().st_size for file in files) > MAX_FULL_BYTES
    return given + [f"{file.name} {file.stat().st_size} {_digest(file, is_sampled)}" for file in files]


def _folder(config: ModelConfig) -> Path | None:
    """Return the folder of a model's files, possibly in the Hub's cache; None for a model without files."""
    from transformers.utils.hub import cached_file

    if is_built_here(config):
        return None
    if Path(config.name_or_path).is_dir():
        return Path(config.name_or_path)
    return Path(cached_file(config.name_or_path, "config.json", revision=config.revision)).parent


def _digest(file: Path, is_sampled: bool) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        for start, stop in _byte_ranges(file) if is_sampled else [(0, file.stat().st_size)]:
            stream.seek(start)
            while start < stop and (block := stream.read(min(1 << 20, stop - start))):
                digest.update(block)
                start += len(block)
    return digest.hexdigest()[:16]


def _byte_ranges(file: Path) -> Iterator[tuple[int, int]]:
    """Yield the byte ranges to hash: the header of a safetensors file, and samples of each tensor."""
    size = file.stat().st_size
    if file.suffix == ".safetensors":
        with open(file, "rb") as stream:
            data_start = 8 + int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(data_start - 8))
        yield 0, data_start
        tensors = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        spans = [(data_start + start, data_start + stop) for start, stop in tensors]
    else:  # offsets of tensors are unknown: take spans of about the size of a tensor
        spans = [(start, min(size, start + (1 << 24))) for start in range(0, size, 1 << 24)]
    for start, stop in spans:
        for number in range(N_SAMPLES):
            first = start + max(0, stop - start - SAMPLE_BYTES) * number // (N_SAMPLES - 1)
            yield first, min(first + SAMPLE_BYTES, stop)
