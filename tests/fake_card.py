"""Let autograd run on fake CUDA tensors, on a machine without a GPU. `card_mode.py` counts what runs on them."""

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")


def missing() -> str:
    """Return what this machine lacks for fake CUDA tensors; "" if it has all."""
    if not sys.platform.startswith("linux") or shutil.which("g++") is None:
        return "needs Linux and g++"
    version = (_torch_folder() / "version.py").read_text()
    return "" if re.search(r"^cuda\b.*= None$", version, re.M) else "needs PyTorch for CPUs"


def load(folder: Path) -> None:
    """Load the library that this needs, which is built in `folder` the first time.

    It must be loaded before torch is imported, since it replaces one of its functions.
    """
    assert "torch" not in sys.modules
    torch, library = _torch_folder(), folder / "fake_card.so"
    if not library.exists():
        paths = [f"-I{torch}/include", f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib"]
        flags = ["-O0", "-shared", "-fPIC", "-std=c++20", *paths, "-lc10", "-ltorch_cpu"]
        subprocess.run(["g++", str(SOURCE), "-o", str(library), *flags], check=True, timeout=300)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def _torch_folder() -> Path:
    return Path(importlib.util.find_spec("torch").submodule_search_locations[0])
