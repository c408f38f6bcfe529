"""Tensors that transformers keeps in float32 are not rounded by loading, training in bfloat16, or saving."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    HunYuanMoEV1Config,
    OlmoHybridConfig,
)

from minitrain.config.schema import Config
from minitrain.config.sections import LoRAConfig, ModelConfig
from minitrain.inference.merge import merge_adapters
from minitrain.model.dtypes import DtypePlan
from minitrain.model.load import build_policy, load_model
from minitrain.model.save import save_model
from minitrain.model.tiny import tiny_tokenizer

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "eos_token_id": 1}
SIZES |= {"pad_token_id": 1, "bos_token_id": 0}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2} | GROUPS
DEEPSEEK, GLM = DeepseekV3Config(**SIZES, **LATENT, **EXPERTS), Glm4MoeConfig(**SIZES, **EXPERTS)
BIAS = "e_score_correction_bias"
HYBRID = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 2}
HYBRID |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
DENSE = {key: value for key, value in SIZES.items() if key != "moe_intermediate_size"}
MODELS = {
    "a buffer": (DEEPSEEK, BIAS),
    "a parameter": (
        Ernie4_5_MoeConfig(**SIZES, moe_num_experts=4, moe_k=2, moe_layer_start_index=1, moe_num_shared_experts=1),
        "gate.weight",
    ),
    "a linear layer that is made in float32": (
        HunYuanMoEV1Config(**DENSE, head_dim=16, num_experts=4, moe_topk=2),
        "gate.wg.weight",
    ),
    "a vector that is made in float32": (OlmoHybridConfig(**DENSE, **HYBRID), "A_log"),
}


@pytest.fixture(params=MODELS)
def folder(request, tmp_path):
    """A model whose tensors of a router are not those that bfloat16 has, with their names and values."""
    config, part = MODELS[request.param]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if part in name:
                tensor.copy_(7 + torch.rand_like(tensor) / 32)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base"), {name: t.clone() for name, t in model.state_dict().items() if part in name}


def assert_kept(tensors, expected):
    assert expected and all(torch.equal(tensors[name].float(), value) for name, value in expected.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_loaded_and_saved(folder, dtype, tmp_path):
    """Also of a model whose other weights are bfloat16 in memory, and in its files."""
    name, expected = folder
    model = load_model(ModelConfig(name_or_path=name, master_dtype=dtype), tiny_tokenizer(), 0)
    assert_kept(model.state_dict(), expected)
    save_model(model, tiny_tokenizer(), tmp_path / "saved", torch.bfloat16)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert_kept(saved.state_dict(), expected)
    files = [load_file(file) for file in (tmp_path / "saved").glob("*.safetensors")]
    assert {tensor.dtype for file in files for tensor in file.values()} == {torch.bfloat16, torch.float32}


def test_the_base_of_an_adapter(folder):
    """The frozen weights of an adapter are in policy_dtype, those of a router in float32."""
    name, expected = folder
    model = ModelConfig(name_or_path=name, policy_dtype="bfloat16")
    config = Config(model=model, datasets=[], lora=LoRAConfig(rank=2, target_modules=["o_proj"]))
    policy, _ = build_policy(config, tiny_tokenizer())
    assert_kept(policy.model.state_dict(), expected)
    frozen = [p.dtype for p in policy.model.parameters() if not p.requires_grad]
    assert torch.bfloat16 in frozen


def test_the_plan_of_a_plain_model():
    """Buffers keep their dtype, and every parameter has the dtype that is asked for."""
    model = torch.nn.BatchNorm1d(3)
    plan = DtypePlan(model, torch.bfloat16)
    assert {name: plan(name, tensor) for name, tensor in model.state_dict().items()} == {
        "weight": torch.bfloat16,
        "bias": torch.bfloat16,
        "running_mean": torch.float32,
        "running_var": torch.float32,
        "num_batches_tracked": torch.int64,
    }


@pytest.mark.parametrize("config", [DEEPSEEK, GLM], ids=["deepseek", "glm"])
@pytest.mark.parametrize("merged", [False, True], ids=["trained", "merged"])
def test_logits_after_training_at_lr_0_are_those_before(config, merged, make_trainer, tmp_path):
    """To the last bit, also where the router of a bfloat16 run has biases that bfloat16 would round."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, buffer in model.named_buffers():
        if BIAS in name:
            buffer.copy_(7 + torch.rand_like(buffer) / 32)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    options = ["lora.rank=2", "lora.target_modules=[o_proj]", "lora.modules_to_save=[lm_head]"] if merged else []
    trainer = make_trainer(
        f"model.name_or_path={tmp_path / 'base'}", "model.policy_dtype=bfloat16", "lr=0", "n_steps=1", *options
    )
    trainer.train()
    final = trainer.run.final
    if merged:
        final = tmp_path / "merged"
        merge_adapters([str(trainer.run.final)], final)
    ids = torch.arange(3, 40)[None]
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()(input_ids=ids).logits
        for folder in (tmp_path / "base", final)
    )
    assert torch.equal(before, after)
