"""What saving needs is tried before the first step, and final/ says what ends its answers."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2LMHeadModel

from minitrain.errors import ConfigError
from minitrain.inference.merge import merge_adapters
from minitrain.model.tiny import tiny_tokenizer
from minitrain.training.setup import dry_run
from tests.conftest import chain_model
from tests.messages import raises

CONTRADICTORY = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "early_stopping": True}


@pytest.fixture
def base(llama_folder, tmp_path):
    """The random Llama with a generation_config.json that transformers loads, and refuses to save once changed."""
    folder = shutil.copytree(llama_folder, tmp_path / "base")
    (folder / "generation_config.json").write_text(json.dumps(CONTRADICTORY))
    return folder


def generation_settings(folder) -> dict:
    """What transformers reads in generation_config.json, apart from tokens, which are those of training."""
    found = GenerationConfig.from_pretrained(folder).to_diff_dict()
    return {k: v for k, v in found.items() if not k.endswith("token_id") and k != "transformers_version"}


def test_a_contradictory_generation_config_is_saved_as_it_was(base, make_trainer, tmp_path):
    """By training, and by merge; loading it again needs nothing."""
    whole = make_trainer(f"model.name_or_path={base}")
    whole.train()
    part = make_trainer(f"model.name_or_path={base}", "exp_name=part", "lora.rank=2")
    part.train()
    merge_adapters([str(part.run.final)], tmp_path / "merged")
    for folder in (whole.run.final, tmp_path / "merged"):
        assert generation_settings(folder) == generation_settings(base) == CONTRADICTORY
        assert AutoModelForCausalLM.from_pretrained(folder).generation_config.temperature == 0.6


def test_converted_weights_are_saved_with_it(tmp_path, make_trainer):
    """Also by the way of models whose weights have other names in files than in memory."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_local_experts=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=259,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(CONTRADICTORY))
    trainer = make_trainer(f"model.name_or_path={tmp_path / 'base'}")
    assert trainer.policy.model._weight_conversions
    trainer.train()
    assert AutoModelForCausalLM.from_pretrained(trainer.run.final).generation_config.temperature == 0.6


@pytest.mark.parametrize(
    "what", ["transformers.LlamaConfig.to_json_file", "transformers.PreTrainedTokenizerFast.save_pretrained"]
)
@pytest.mark.parametrize("command", ["train", "validate", "merge"])
def test_what_cannot_be_saved_is_refused_before_the_first_step(what, command, make_trainer, monkeypatch, tmp_path):
    """One error that says so."""
    part = make_trainer("lora.rank=2", "exp_name=part")
    part.train()
    whole = make_trainer().config

    def refuse(*_, **__):
        raise ValueError("rope_theta is no number")

    monkeypatch.setattr(what, refuse)
    with raises(ConfigError, "unsupported-model", "model.name_or_path: ", "rope_theta is no number"):
        if command == "merge":
            merge_adapters([str(part.run.final)], tmp_path / "merged")
        elif command == "validate":
            dry_run(whole)
        else:
            make_trainer()


@pytest.fixture
def gpt2(tmp_path):
    """A GPT-2 without a chat template that says x, y, <|im_end|>, z, z, ... by construction; its own EOS is another."""
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    tokenizer.eos_token = "<|pad|>"
    x, y, z = tokenizer("xyz")["input_ids"]
    chain_model(tokenizer, x, y, end, z, like=GPT2LMHeadModel).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.parametrize("merged", [False, True])
def test_transformers_ends_answers_where_training_did(gpt2, make_trainer, tmp_path, merged):
    """Its own `generate` stops at the end of a turn, though that of the base goes on."""
    trainer = make_trainer(f"model.name_or_path={gpt2}", "lr=1e-6", *(["lora.rank=2"] if merged else []))
    trainer.train()
    folder = trainer.run.final
    if merged:
        folder = tmp_path / "merged"
        merge_adapters([str(trainer.run.final)], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end, (x, y, z) = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer("xyz")["input_ids"]

    def answer(source) -> list[int]:
        model = AutoModelForCausalLM.from_pretrained(source)
        return model.generate(torch.tensor([[x]]), max_new_tokens=5, do_sample=False)[0].tolist()

    assert answer(gpt2) == [x, y, end, z, z, z]
    assert answer(folder) == [x, y, end]
    for found in (AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)):
        assert sorted(found.eos_token_id) == sorted({end, tokenizer.eos_token_id})
