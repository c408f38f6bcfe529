"""What a model does to the products of its head is measured, not read from names of options."""

import pytest
import torch
import transformers as tf

from minitrain.batch import Document, collate
from minitrain.model.load_check import check_policy
from minitrain.model.output_layer import OutputForm, measure_output
from minitrain.model.policy import Policy
from minitrain.model.trial import check_meta_policy
from minitrain.model.weights import parameters_on_meta
from tests.conftest import random_llama
from tests.shapes import SHAPE

MAMBA = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8)
GRIFFIN = dict(lru_width=32, attention_window_size=16, block_types=["recurrent", "attention"])
XLSTM = dict(vocab_size=128, hidden_size=64, num_heads=4, num_hidden_layers=2, qk_dim_factor=0.5, v_dim_factor=1.0)
BERT = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}


def padded_vocabulary():
    """Like Inkling, which cuts the logits of tokens that do not exist."""
    model = random_llama()
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits[..., :200])
    return model


MODELS = {
    "falcon-h1": (
        lambda: tf.FalconH1ForCausalLM(tf.FalconH1Config(**SHAPE, **MAMBA, lm_head_multiplier=0.3)),
        0.3,
        None,
    ),
    "hyperclovax": (lambda: tf.HyperCLOVAXForCausalLM(tf.HyperCLOVAXConfig(**SHAPE, logits_scaling=3.0)), 3.0, None),
    "granite": (lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**SHAPE, logits_scaling=4.0)), 0.25, None),
    "recurrent-gemma": (
        lambda: tf.RecurrentGemmaForCausalLM(tf.RecurrentGemmaConfig(**SHAPE, **GRIFFIN, logits_soft_cap=2.0)),
        1.0,
        2.0,
    ),
    "xlstm": (lambda: tf.xLSTMForCausalLM(tf.xLSTMConfig(**XLSTM, chunk_size=8, output_logit_soft_cap=2.0)), 1.0, 2.0),
    "modernbert": (lambda: tf.ModernBertDecoderForCausalLM(tf.ModernBertDecoderConfig(**BERT)), 1.0, None),
    "padded": (padded_vocabulary, 1.0, None),
}


@pytest.mark.parametrize("name", MODELS)
def test_logps_are_those_of_the_model(name):
    """Of a model with weights, and the form is the same on the meta device."""
    make, scale, softcap = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    policy = Policy(model)
    assert policy.output_form.scale == pytest.approx(scale, 1e-6) and policy.output_form.softcap == softcap
    check_policy(policy, packing=False)
    ids = torch.arange(3, 15)
    mask = torch.tensor([0] + [1] * 11, dtype=torch.uint8)
    actual = policy(collate([[Document(ids.int(), mask)]], 0)).logps
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    torch.testing.assert_close(actual, logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0], rtol=1e-4, atol=1e-4)
    with parameters_on_meta():
        outline = make().eval()
    assert measure_output(outline)[:3] == policy.output_form[:3]
    assert check_meta_policy(Policy(outline), packing=False) == []


def test_measuring_leaves_the_model_as_it_was():
    """A forward of its own stays, too."""
    model = random_llama()
    model.model.forward = forward = model.model.forward
    ids = torch.arange(3, 15)[None]
    before = model(input_ids=ids).logits
    assert measure_output(model) == OutputForm()
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.model.forward is forward and "forward" not in vars(model.lm_head)
