"""What the tests of the data room share: configs with a cache of their own, files, and the tokenizers."""

import json

import pytest

from minitrain.config.schema import Config
from minitrain.config.sections import DatasetConfig, ModelConfig
from minitrain.data.template import Template
from minitrain.model.tiny import tiny_tokenizer


@pytest.fixture
def template() -> Template:
    """The embedded tokenizer (one token a byte, no template of its own) with ChatML."""
    return Template(tiny_tokenizer())


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(model=ModelConfig("tiny"), cache_dir=str(tmp_path / "cache"), num_proc=1)


@pytest.fixture
def jsonl(tmp_path):
    """Writes rows into a .jsonl file and returns the entry that reads it."""

    def write(rows: list, name: str = "rows.jsonl", **options) -> DatasetConfig:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return DatasetConfig(path=str(path), **options)

    return write
