"""What a model's files say acts only as far as our own options allow."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config

from minitrain.config.schema import Config
from minitrain.config.sections import ModelConfig
from minitrain.inference.generate import load_generator
from minitrain.model.load import build_policy, load_tokenizer
from minitrain.model.pretrained import read_model_config


@pytest.fixture
def base(llama_folder, tmp_path):
    """The random Llama in a folder whose files may be changed."""
    return shutil.copytree(llama_folder, tmp_path / "base")


def change_config(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


NAMES_OF_CODE = {
    "_attn_implementation": "someone/kernel",
    "_attn_implementation_internal": "someone/kernel",
    "_experts_implementation": "someone/kernel",
    "fusion_config": {"someone/kernel": True},
}


@pytest.mark.parametrize("key", NAMES_OF_CODE)
def test_a_config_names_no_kernel(key, base, make_trainer, rows_file):
    """transformers loads the kernel that config.json names, from the hub (CVE-2026-4372). Here the config of a policy,
    a reference, a teacher, a model to answer with or one that is built empty does not choose its attention."""
    change_config(base, **{key: NAMES_OF_CODE[key]})
    assert load_generator(str(base), device="cpu").model.config._attn_implementation == "sdpa"
    options = ("loss.name=kd", f"loss.teacher={base}", f"model.name_or_path={base}")
    trainer = make_trainer(*options)
    for model in (trainer.policy.model, trainer.models.teacher.policy.model):
        assert model.config._attn_implementation == "sdpa"
    config = Config(model=ModelConfig(name_or_path=str(base)))
    policy, weights = build_policy(config, load_tokenizer(config.model), sharded=True)
    assert policy.model.config._attn_implementation == "sdpa" and weights is not None


def test_our_own_choice_acts(base, make_trainer):
    """model.attn_implementation is what is used, whatever config.json says."""
    change_config(base, _attn_implementation="flash_attention_2")
    trainer = make_trainer(f"model.name_or_path={base}", "model.attn_implementation=eager")
    assert trainer.policy.model.config._attn_implementation == "eager"


def test_parts_of_a_config_name_no_kernel(tmp_path):
    """The config within a config is cleared as well."""
    Gemma3Config().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["_attn_implementation"] = part["_experts_implementation"] = "someone/kernel"
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_model_config(ModelConfig(name_or_path=str(tmp_path)))
    for part in (found, found.text_config, found.vision_config):
        assert part._attn_implementation is None and part._experts_implementation is None


def edit_weights(folder, **tensors) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_head_of_its_own_is_read_on_every_path(base, factor):
    """Where config.json says tied and the files hold an output layer, a model that is built empty has that one too."""
    config = Config(model=ModelConfig(name_or_path=str(base)))
    head = load_file(base / "model.safetensors")["model.embed_tokens.weight"] * factor
    edit_weights(base, **{"lm_head.weight": head})
    for empty in (False, True):
        policy, weights = build_policy(config, load_tokenizer(config.model), sharded=empty)
        assert (weights is not None) == (empty and factor == 1)  # equal ones are tied, and read by rows
        if weights is None:
            assert torch.equal(policy.model.get_output_embeddings().weight, head)


@pytest.mark.parametrize("empty", [False, True])
def test_tensors_without_a_place_are_told(base, empty, caplog):
    """Weights in the files that the model does not use, such as a bias that config.json does not ask for."""
    config = Config(model=ModelConfig(name_or_path=str(base)))
    build_policy(config, load_tokenizer(config.model), sharded=empty)
    assert not caplog.messages
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_weights(base, **{name: torch.ones(32), "visual.weight": torch.ones(2)})
    build_policy(config, load_tokenizer(config.model), sharded=empty)
    assert caplog.messages == [
        f"{base}: its files have {name} and 1 more, which the model of its config.json does not use."
    ]
