"""Tokenizers that have no token for some text, or are damaged."""

import json

import pytest

from minitrain.config.sections import ModelConfig
from minitrain.data.examples import Conversation, PlainText, assistant, user
from minitrain.data.template import Template
from minitrain.errors import ConfigError, DataError
from minitrain.model.load import load_tokenizer
from minitrain.model.tiny import tiny_tokenizer
from tests.messages import raises


@pytest.fixture
def changed(tmp_path):
    """``changed(model=..., normalizer=...)``: the embedded tokenizer, read again with other parts in its file."""

    def change(**parts):
        tiny_tokenizer().save_pretrained(tmp_path)
        file = tmp_path / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | parts))
        return load_tokenizer(ModelConfig(str(tmp_path)))

    return change


def without(*characters: str) -> dict:
    """The model of the embedded tokenizer, which has no token for some characters."""
    model = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    return model | {"vocab": {token: number for token, number in model["vocab"].items() if token not in characters}}


def test_no_token_for_a(changed):
    """It is no error, but text with that letter is refused: the tokenizer would leave it out without a word."""
    template = Template(changed(model=without("a")), "none")
    assert template.encode(Conversation([user("his"), assistant("b")]))
    for record in (Conversation([user("has"), assistant("b")]), PlainText("hat")):
        with raises(DataError, "invalid-text", "'a'"):
            template.encode(record)


def test_a_tokenizer_that_makes_nothing(changed):
    template = Template(changed(normalizer={"type": "Replace", "pattern": {"Regex": "."}, "content": ""}), "none")
    with raises(DataError, "invalid-text", "'x'"):
        template.encode_prompt([user("x")])


def test_a_panic_of_the_tokenizer(changed):
    """It is an error of Rust code that is no Exception in Python."""
    broken = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    with raises(ConfigError, "unreadable", "Cannot parse precompiled_charsmap"):
        changed(normalizer=broken)


def test_a_tokenizer_that_cannot_encode(changed):
    """WordLevel without the unknown token that it names fails in each text."""
    tokenizer = changed(model={"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "?"})
    with raises(DataError, "invalid-text", "'a'", "WordLevel error"):
        Template(tokenizer)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_files_nested_too_deeply(tmp_path, file):
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / file).write_text("[" * 100_000)
    with raises(ConfigError, "damaged-file", str(tmp_path / file)):
        load_tokenizer(ModelConfig(str(tmp_path)))


def test_an_empty_eos(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": ""}))
    with raises(ConfigError, "unsupported-model", "EOS"):
        load_tokenizer(ModelConfig(str(tmp_path)))
