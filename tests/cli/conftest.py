"""A folder with finished runs, for tests of all commands."""

import json
import os
import shutil

import pytest

from minitrain.cli.main import main
from tests.commands import SAVED_ANSWER
from tests.conftest import furnish


@pytest.fixture(scope="session")
def trained(tmp_path_factory, llama_folder, rows_file):
    """A folder with configs, data, a model, and runs of a model, an adapter and a classifier."""
    folder = tmp_path_factory.mktemp("trained")
    config = furnish(folder, llama_folder, rows_file)
    (folder / "c.yml").write_text(json.dumps(config | {"cache_dir": "cache", "validation_split": 0.5}))
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert main(["train", "c.yml", "--overrides", "exp_name=lora", "lora.rank=2"]) == 0
        classify = ["exp_name=labels", "loss.name=classify", "datasets=[labels.jsonl]"]
        assert main(["train", "c.yml", "--overrides", *classify]) == 0
        os.mkdir("runs/lora/rollouts")
        with open("runs/lora/rollouts/round-1.jsonl", "w") as file:
            json.dump(SAVED_ANSWER, file)
    finally:
        os.chdir(before)
    shutil.rmtree(folder / "cache")
    return folder


@pytest.fixture
def trained_folder(trained, tmp_path, monkeypatch):
    """A copy of that folder, without cached tokens, as the current folder."""
    shutil.copytree(trained, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"
