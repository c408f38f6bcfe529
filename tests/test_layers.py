"""Imports point downward: each file imports only its own package and the packages below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

LAYERS = (
    {"errors", "batch", "io"},
    {"config"},
    {"data", "model", "losses", "distributed"},
    {"training"},
    {"inference"},
    {"rl"},
    {"tools"},
    {"trainer", "session"},
    {"cli"},
    {"__main__", "__init__"},
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
TOGETHER = LAYERS[0]  # whose files may import one another
FILES = sorted((ROOT / "minitrain").rglob("*.py"))


def package_of(file: Path) -> str:
    """Return the entry at the top level of minitrain/ that a file belongs to."""
    return file.relative_to(ROOT / "minitrain").with_suffix("").parts[0]


def imports(node: ast.AST, file: Path) -> Iterator[str]:
    """Yield the top-level entries of minitrain that a file imports when it runs, also inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.ImportFrom) and child.level:
            parts = file.relative_to(ROOT / "minitrain").parts
            target = (*parts[: len(parts) - child.level], *(child.module or "").split("."))
            yield from [target[0]] if target[0] else [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom) and child.module.split(".")[0] == "minitrain":
            target = child.module.split(".")[1:]
            yield from target[:1] or [alias.name for alias in child.names if alias.name in LEVELS]
        yield from imports(child, file)


def upward(file: Path) -> set[str]:
    """Return what a file imports from its own layer or from a higher one, other than its own package."""
    own = package_of(file)
    found = set(imports(ast.parse(file.read_text()), file)) - {own}
    return {name for name in found if LEVELS[name] >= LEVELS[own] and not {name, own} <= TOGETHER}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_downward(file):
    assert not upward(file)


def test_every_entry_has_a_layer():
    assert {package_of(file) for file in FILES} == LEVELS.keys()
