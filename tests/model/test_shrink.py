"""Small models of the shapes of large ones: they compute, keep each kind of layer, and load as the large ones do."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from minitrain import ConfigError
from minitrain.config.sections import ModelConfig
from minitrain.model import shrink
from minitrain.model.load import load_model, load_tokenizer
from minitrain.model.shrink import shrink_model
from minitrain.model.tiny import tiny_tokenizer
from tests.messages import raises

VOCABULARY = 320
QUICK = ("llama", "gpt2", "gemma3_text", "qwen3_moe")
SLOW = ("mamba2", "qwen3_next", "deepseek_v3", "gpt_oss", "gpt_neox", "lfm2", "phi3")


@pytest.fixture
def large(tmp_path):
    """Return a function that writes the config of a large model and a tokenizer, without weights."""

    def write(kind: str, **changes) -> ModelConfig:
        CONFIG_MAPPING[kind](vocab_size=VOCABULARY, **{"pad_token_id": None} | changes).save_pretrained(
            tmp_path / "large"
        )
        tiny_tokenizer().save_pretrained(tmp_path / "large")
        return ModelConfig(str(tmp_path / "large"))

    return write


@pytest.mark.parametrize("kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def test_it_is_small_and_has_each_kind_of_layer(large, tmp_path, kind):
    config = large(kind)
    full = CONFIG_MAPPING[kind]()
    size = shrink_model(config, tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    small = model.config
    kinds = [set(getattr(one, "layer_types", None) or ["same"]) for one in (full, small)]
    assert kinds[0] == kinds[1] and small.num_hidden_layers == max(2, len(kinds[0])) < full.num_hidden_layers
    assert small.vocab_size == VOCABULARY and small.hidden_size < 300
    n = sum(parameter.numel() for parameter in model.parameters())
    assert n < 30_000_000 and f"{n:,} parameters" in size and str(full.hidden_size) in size
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()


def test_ratios_of_heads_and_the_tokenizer_stay(large, tmp_path):
    """8 queries share a key as before, heads are as wide as before, and minitrain loads model and tokenizer."""
    config = large("llama", num_attention_heads=32, num_key_value_heads=4, hidden_size=2048)
    shrink_model(config, tmp_path / "small", min_width=128)
    small = ModelConfig(str(tmp_path / "small"))
    tokenizer = load_tokenizer(small)
    model = load_model(small, tokenizer, 0)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (16, 2, 64)
    assert model.config.hidden_size == 1024 and tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def test_a_model_without_a_head(large, tmp_path):
    """From it, a classifier gets a new head; one with scores keeps the number of its labels."""
    config = large("llama", num_labels=3)
    shrink_model(config, tmp_path / "body", head="none")
    model = load_model(ModelConfig(str(tmp_path / "body")), tiny_tokenizer(), 0, outputs=["a", "b", "c", "d"])
    assert model.score.out_features == 4
    assert "ForSequenceClassification" in shrink_model(config, tmp_path / "scores", head="scores")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "scores").config.num_labels == 3


def test_a_model_that_fits_no_size_is_named(large, tmp_path, monkeypatch):
    monkeypatch.setattr(shrink, "_try", lambda model: 1 / 0)
    config = large("llama", hidden_size=128, intermediate_size=128, num_attention_heads=4)
    with raises(ConfigError, "unsupported-model", "large", "division by zero"):
        shrink_model(config, tmp_path / "small")
    assert not (tmp_path / "small").exists()
