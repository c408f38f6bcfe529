"""Experts, which transformers stores as 3-D parameters: how much of a model an option reaches is reported."""

import pytest
import torch
import transformers as tf

from minitrain.config.schema import Config
from minitrain.config.sections import LoRAConfig, ModelConfig
from minitrain.model.load import CPU, META, build_policy
from minitrain.model.save import save_model
from minitrain.model.tiny import tiny_tokenizer

pytestmark = pytest.mark.numeric

SHAPE = dict(
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    num_experts_per_tok=2,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MODELS = {
    "mixtral": lambda **k: tf.MixtralForCausalLM(tf.MixtralConfig(**SHAPE, num_local_experts=4, **k)),
    "qwen3-moe": lambda **k: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SHAPE, num_experts=4, **k)),
    "gpt-oss": lambda **k: tf.GptOssForCausalLM(
        tf.GptOssConfig(**SHAPE, num_local_experts=4, rope_parameters=ROPE, sliding_window=16, **k)
    ),
    "deepseek-v3": lambda **k: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **SHAPE | {"num_key_value_heads": 4},
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            n_shared_experts=1,
            first_k_dense_replace=1,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            **k,
        )
    ),
    "gpt2": lambda **k: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, **k)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each model as a folder, with the embedded tokenizer and random values everywhere."""
    tokenizer, made = tiny_tokenizer(), {}
    for name, make in MODELS.items():
        torch.manual_seed(1)
        model = make(vocab_size=len(tokenizer))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        made[name] = tmp_path_factory.mktemp(name)
        save_model(model, tokenizer, made[name], torch.float32)
    return made


def build(folder, device=CPU, quantization="none", **lora):
    """The model of `build_policy` with a LoRA."""
    config = Config(model=ModelConfig(str(folder), quantization=quantization), lora=LoRAConfig(**{"rank": 4} | lora))
    return build_policy(config, tiny_tokenizer(), device)[0].model


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_a_lora_on_all_linear_layers_says_how_much_it_reaches(folders, name):
    """In a layer with 4 experts these are the attention's 3,072 of 21,632 weights; routers are parameters too."""
    model = build(folders[name])
    attention, experts, router = 32 * 32 * 2 + 2 * 16 * 32, 4 * 3 * 48 * 32, 4 * 32
    share = attention / (attention + experts + router)
    kinds = "mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp." + {"mixtral": "gate", "gpt-oss": "router"}[name]
    assert model.matrices == f"{share:.1%} adapted, {1 - share:.1%} frozen ({kinds})"
    assert build(folders[name], META).matrices == model.matrices


def test_full_training_and_frozen_layers(folders):
    """Everything is trained; a frozen block is half of the matrices, by name."""
    config = Config(model=ModelConfig(str(folders["gpt2"])))
    assert build_policy(config, tiny_tokenizer())[0].model.matrices == "100.0% trained"
    config.freeze_layers = [0]
    words = build_policy(config, tiny_tokenizer())[0].model.matrices
    assert words == "50.0% trained, 50.0% frozen (mlp.c_fc, mlp.c_proj, attn.c_attn, attn.c_proj)"
