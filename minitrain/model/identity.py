"""What tells a model from another one by its files: for caches of what it computed, and for checkpoints."""

import hashlib
from pathlib import Path

from ..schema import ModelConfig
from .adapter_files import CONFIG_FILE
from .archive import archive_files


def identity(config: ModelConfig) -> list[str]:
    """Tells whether the files of a local model are the same: size, beginning and end of each, without reading all."""
    found = []
    folders = [Path(folder) for folder in (config.name_or_path, config.adapter) if folder]
    files = sorted(file for folder in folders for file in folder.glob("*"))
    for file in [*files, *(archive_files(Path(config.archive)) if config.archive else [])]:
        if file.suffix in (".safetensors", ".bin", ".pt") or file.name in ("config.json", CONFIG_FILE):
            with open(file, "rb") as opened:
                ends = opened.read(1 << 20)
                opened.seek(max(0, file.stat().st_size - (1 << 20)))
                digest = hashlib.sha256(ends + opened.read())
            found.append(f"{file.name} {file.stat().st_size} {digest.hexdigest()[:16]}")
    return found
