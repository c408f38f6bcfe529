"""Paths of files and of model folders."""

import difflib
import json
import re
from pathlib import Path

from .redact import redact

INDEX = "model.safetensors.index.json"  # of a sharded model


def near_file(path: Path) -> str:
    """Return a hint about a file of the same folder with this name and a suffix, or with a similar name; else ""."""
    names = sorted(p.name for p in path.parent.glob("*") if p.name != path.name)
    with_suffix = [name for name in names if path.name and name.startswith(f"{path.name}.")]
    match = with_suffix or difflib.get_close_matches(path.name, names, n=1, cutoff=0.8)
    if not match:
        return ""
    return f" Did you mean {path.parent / match[0] if redact(str(path)) == str(path) else match[0]}?"


def looks_local(name: str) -> bool:
    """Return whether a model's name can only be a local path; on the Hub it is `name` or `owner/name`."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or len(Path(name).parts) > 2 or _is_windows(name)


def _is_windows(name: str) -> bool:
    """Return whether a name can only be a path of Windows, which a config from there may have."""
    return "\\" in name or re.match(r"[A-Za-z]:", name) is not None


def shard_names(index: Path) -> list[str]:
    """Return the names of the files that the index of a model lists."""
    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))


def holds_model(folder: Path) -> bool:
    """Return whether a folder has a model or an adapter."""
    return (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()
