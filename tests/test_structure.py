"""How long files and functions are, and what the training loop may know."""

import ast
import re

from tests.conftest import ROOT

SOURCES = sorted((ROOT / "minitrain").rglob("*.py"))


def test_the_loop_names_no_loss_and_no_model():
    """trainer.py knows neither the name of a loss nor an architecture."""
    text = (ROOT / "minitrain" / "trainer.py").read_text().lower()
    for word in ("sft", "dft", "dpo", "llama", "qwen", "gpt"):
        assert not re.search(rf"\b{word}\b", text), word


def test_files_and_functions_are_short():
    """Files have at most 400 lines, functions at most 60."""
    for file in SOURCES:
        text = file.read_text()
        assert text.count("\n") <= 400, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 60, f"{file}:{node.lineno} {node.name}"


def test_one_step_can_be_followed_in_five_files():
    """config, trainer, loader, policy and sft are under 1,800 lines together."""
    names = ("config/load.py", "trainer.py", "data/loader.py", "model/policy.py", "losses/sft.py")
    assert sum((ROOT / "minitrain" / name).read_text().count("\n") for name in names) < 1800


def test_files_of_tests_have_names_of_their_own():
    """pytest imports test files by their name alone, so two of the same name are an error of the full run only."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)


def test_every_module_is_imported():
    """A module that nothing imports is dead; the losses are imported as a folder."""
    text = "\n".join(file.read_text() for file in SOURCES)
    for file in SOURCES:
        if file.stem not in ("__init__", "__main__") and file.parent.name != "losses":
            assert re.search(rf"(from|import) [^\n]*\b{file.stem}\b", text), file
