"""Files, folders and names of the hub that options name: whether they are there, and are what is asked for."""

import difflib
import os
from pathlib import Path

from minitrain.config.issues import Problems, nearest
from minitrain.config.schema import DatasetConfig
from minitrain.errors import ConfigError
from minitrain.io.redact import redact


def check_source(key: str, entry: DatasetConfig, problems: Problems) -> None:
    """Whether what an entry names can be read, as far as that can be seen here."""
    from importlib.util import find_spec

    from minitrain.data.files import FORMATS, format_of
    from minitrain.data.source import is_file

    path, extra = Path(entry.path), "is not installed: pip install minitrain[data]"
    if "://" in entry.path:
        problems.add(f"{key}.path", f"{entry.path} is an address; download it, and name the file.")
        return
    if not is_file(entry):
        if (path / "config.json").is_file():
            problems.add(f"{key}.path", f"{path} is the folder of a model; name a file, or a folder of data.")
        elif path.is_dir() and not any(format_of(file) in FORMATS for file in path.rglob("*")):
            problems.add(f"{key}.path", f"{path} is a folder without a .{', .'.join(FORMATS)} file; name a file.")
        elif find_spec("datasets") is None:
            problems.add(f"{key}.path", f"the package datasets, which reads it, {extra}")
        if path.is_dir() and entry.revision:
            problems.add(f"{key}.revision", "would be ignored: a folder has none.", f"{key}.path")
        return
    if not path.exists():
        problems.add(f"{key}.path", f"there is no file {path} (seen from {Path.cwd()}).{near_file(path)}")
    elif not path.is_file():
        problems.add(f"{key}.path", f"{path} is a device or a pipe, which cannot be read twice.")
    elif not os.access(path, os.R_OK):
        problems.add(f"{key}.path", f"no permission to read {path}.")
    elif format_of(path) not in FORMATS:
        problems.add(f"{key}.path", f"{path} is no .{', .'.join(FORMATS)} file (.gz behind it is fine).")
    elif format_of(path) == "parquet" and find_spec("pyarrow") is None:
        problems.add(f"{key}.path", f"the package pyarrow, which reads it, {extra}")
    for option in ("split", "name", "revision"):
        if getattr(entry, option) is not None:
            told = "would be ignored: it is for data sets on the hub or in a folder."
            problems.add(f"{key}.{option}", told, f"{key}.path")


def check_folder(key: str, name: str, for_adapter: str, problems: Problems) -> None:
    """`for_adapter`: what to do about a folder {} that is an adapter."""
    folder = Path(name)
    if name == "tiny" or not looks_local(name):
        return
    if not folder.is_dir():
        problems.add(key, f"there is no folder {folder} (seen from {Path.cwd()}).{near_file(folder)}")
    elif (folder / "final" / "config.json").is_file():
        problems.add(key, f"{folder} is the folder of a run; its model is {folder / 'final'}.")
    elif (folder / "adapter_config.json").is_file():
        problems.add(key, f"{folder} is an adapter; {for_adapter.format(folder)}.")
    elif not (folder / "config.json").is_file():
        problems.add(key, f"{folder} holds no config.json, so it is not a model's folder.")


def check_archive(path: Path, problems: Problems) -> None:
    from minitrain.model.state_dict import archive_files

    if (path / "final").is_dir():
        problems.add("model.archive", f"{path} is the folder of a run; its model is {path / 'final'}.")
    elif (path / "adapter_config.json").is_file():
        problems.add("model.archive", f"{path} is an adapter; name it as model.adapter.")
    elif not archive_files(path):
        told = f"{path} is not a .safetensors, .pt or .bin file that exists, nor a folder with model.safetensors."
        problems.add("model.archive", told + near_file(path))


def near_file(path: Path) -> str:
    """A file of nearly that name in the same folder, or of that name with an ending."""
    names = sorted(p.name for p in path.parent.glob("*") if p.name != path.name)
    whole = [name for name in names if path.name and name.startswith(f"{path.name}.")]
    match = whole or difflib.get_close_matches(path.name, names, n=1, cutoff=0.8)
    if not match:
        return ""
    return f" Did you mean {path.parent / match[0] if redact(str(path)) == str(path) else match[0]}?"


def looks_local(name: str) -> bool:
    """Whether a model's name can only be that of a folder; on the hub it is `name` or `owner/name`."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or len(Path(name).parts) > 2


def find_model(source: str) -> str:
    """Return the folder with the model of a run, a model's own folder, or a name of the hub as it is.

    Raises ConfigError for a folder that is not there or holds no model.
    """
    folder = Path(source)
    if not folder.is_dir() and (looks_local(source) or _beside_runs(folder)):
        there = [str(run.parent) for run in folder.parent.glob("*/metrics.jsonl")]
        raise ConfigError(f"{source}: there is no such folder (seen from {Path.cwd()}).{nearest(source, there)}")
    if not folder.is_dir() or _holds_model(folder):
        return source
    for name in ("final", "best"):
        if _holds_model(folder / name):
            return str(folder / name)
    if (folder / "checkpoints").is_dir():
        raise ConfigError(f"{source}: this run is not finished; the same training command goes on with it.")
    raise ConfigError(f"{source}: holds neither a model (config.json), an adapter, nor a finished run (final/).")


def _beside_runs(folder: Path) -> bool:
    """Whether ``runs/name`` can only be meant for a run, although hub names look like that too."""
    return len(folder.parts) == 2 and (folder.parts[0] == "runs" or any(folder.parent.glob("*/metrics.jsonl")))


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").exists() or (folder / "adapter_config.json").exists()
