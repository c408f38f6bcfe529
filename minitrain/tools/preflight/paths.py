"""Files, folders and names of the hub that options name: whether they are there, and are what is asked for."""

import os
from pathlib import Path

from minitrain.config.issues import ConfigIssues
from minitrain.config.schema import DatasetConfig
from minitrain.io.paths import looks_local, near_file


def check_source(key: str, entry: DatasetConfig, issues: ConfigIssues) -> None:
    """Whether what an entry names can be read, as far as that can be seen here."""
    from importlib.util import find_spec

    from minitrain.data.files import FORMATS, format_of
    from minitrain.data.source import is_file

    path, extra = Path(entry.path), "is not installed: pip install minitrain[data]"
    if "://" in entry.path:
        issues.add(f"{key}.path", f"{entry.path} is an address; download it, and name the file.")
        return
    if not is_file(entry):
        if (path / "config.json").is_file():
            issues.add(f"{key}.path", f"{path} is the folder of a model; name a file, or a folder of data.")
        elif path.is_dir() and not any(format_of(file) in FORMATS for file in path.rglob("*")):
            issues.add(f"{key}.path", f"{path} is a folder without a .{', .'.join(FORMATS)} file; name a file.")
        elif find_spec("datasets") is None:
            issues.add(f"{key}.path", f"the package datasets, which reads it, {extra}")
        if path.is_dir() and entry.revision:
            issues.add(f"{key}.revision", "would be ignored: a folder has none.", f"{key}.path")
        return
    if not path.exists():
        issues.add(f"{key}.path", f"there is no file {path} (seen from {Path.cwd()}).{near_file(path)}")
    elif not path.is_file():
        issues.add(f"{key}.path", f"{path} is a device or a pipe, which cannot be read twice.")
    elif not os.access(path, os.R_OK):
        issues.add(f"{key}.path", f"no permission to read {path}.")
    elif format_of(path) not in FORMATS:
        issues.add(f"{key}.path", f"{path} is no .{', .'.join(FORMATS)} file (.gz behind it is fine).")
    elif format_of(path) == "parquet" and find_spec("pyarrow") is None:
        issues.add(f"{key}.path", f"the package pyarrow, which reads it, {extra}")
    for option in ("split", "name", "revision"):
        if getattr(entry, option) is not None:
            told = "would be ignored: it is for data sets on the hub or in a folder."
            issues.add(f"{key}.{option}", told, f"{key}.path")


def check_folder(key: str, name: str, for_adapter: str, issues: ConfigIssues) -> None:
    """`for_adapter`: what to do about a folder {} that is an adapter."""
    folder = Path(name)
    if name == "tiny" or not looks_local(name):
        return
    if not folder.is_dir():
        issues.add(key, f"there is no folder {folder} (seen from {Path.cwd()}).{near_file(folder)}")
    elif (folder / "final" / "config.json").is_file():
        issues.add(key, f"{folder} is the folder of a run; its model is {folder / 'final'}.")
    elif (folder / "adapter_config.json").is_file():
        issues.add(key, f"{folder} is an adapter; {for_adapter.format(folder)}.")
    elif not (folder / "config.json").is_file():
        issues.add(key, f"{folder} holds no config.json, so it is not a model's folder.")


def check_archive(path: Path, issues: ConfigIssues) -> None:
    from minitrain.model.state_dict import archive_files

    if (path / "final").is_dir():
        issues.add("model.archive", f"{path} is the folder of a run; its model is {path / 'final'}.")
    elif (path / "adapter_config.json").is_file():
        issues.add("model.archive", f"{path} is an adapter; name it as model.adapter.")
    elif not archive_files(path):
        told = f"{path} is not a .safetensors, .pt or .bin file that exists, nor a folder with model.safetensors."
        issues.add("model.archive", told + near_file(path))
