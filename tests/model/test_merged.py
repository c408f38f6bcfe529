"""The weights with a merged adapter that are read from a model in training."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from minitrain.model import experts
from minitrain.model.adapter import inject
from minitrain.model.lora import merge_lora_weights
from minitrain.model.merged import merged_tensors
from minitrain.model.quantize import dequantize_model, quantize_model
from minitrain.model.token_rows import has_rows
from minitrain.model.weights import state_tensors

pytestmark = pytest.mark.numeric
SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama(tied=True):
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=2, n_positions=32))


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2))


ADAPTER = {"r": 4, "lora_alpha": 8, "bias": "none", "target_modules": "all-linear"}
CASES = {
    "lora": (llama, ADAPTER, None),
    "dora and rslora": (llama, ADAPTER | {"use_dora": True, "use_rslora": True}, None),
    "conv1d": (gpt2, ADAPTER, None),
    "embeddings": (lambda: llama(False), ADAPTER | {"target_modules": ["embed_tokens", "lm_head"]}, None),
    "rows of tokens": (llama, ADAPTER | {"trainable_token_indices": [3, 5]}, None),
    "saved modules": (lambda: llama(False), ADAPTER | {"modules_to_save": ["lm_head"]}, None),
    "4bit": (llama, ADAPTER | {"use_dora": True}, "4bit"),
    "8bit": (llama, ADAPTER, "8bit"),
    "experts": (mixtral, ADAPTER | {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}, None),
    "4bit experts": (
        mixtral,
        ADAPTER | {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
        "4bit",
    ),
}


def adapted(make, adapter, bits, dequantize):
    """Return a model with a random adapter, the same one for both values of `dequantize`."""
    torch.manual_seed(0)
    model = make().requires_grad_(False)
    model.new_ids = []
    if bits:
        quantize_model(model, bits, torch.float32, torch.device("cpu"))
    if bits and dequantize:
        dequantize_model(model)
    kept = inject(model, adapter).parameters(model)
    with torch.no_grad():
        for parameter in kept.values():
            parameter.normal_()
    return model


@pytest.mark.parametrize("name", CASES)
def test_merged_weights_equal_those_of_a_merged_model(name):
    make, adapter, bits = CASES[name]
    model, merged = (adapted(make, adapter, bits, dequantize) for dequantize in (False, True))
    before = {key: value.clone() for key, value in model.named_parameters()}
    found = dict(merged_tensors(model, lambda tensor: tensor.clone()))
    assert all(torch.equal(value, before[key]) for key, value in model.named_parameters())

    for module in list(merged.modules()):
        if hasattr(module, "lora") or has_rows(module):
            merge_lora_weights(module)
        elif experts.is_wrapped(module):
            experts.merge_experts(module)
    expected = state_tensors(merged)
    assert found.keys() == expected.keys() <= make().state_dict().keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key].float(), value, rtol=1e-6, atol=1e-6, msg=key)
