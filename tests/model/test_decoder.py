"""The text decoder of a model: the module that is called, whose blocks are frozen and checkpointed."""

import pytest
import torch
import transformers as tf

from minitrain.batch import Document, collate
from minitrain.model.decoder import decoder_of, find_blocks
from minitrain.model.load import freeze_layers
from minitrain.model.load_check import check_policy
from minitrain.model.policy import Policy
from minitrain.model.recompute import checkpoint_activations
from tests.shapes import SHAPE

TEXT = SHAPE | {"head_dim": 8}
VISION = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4
)


def gemma3():
    config = tf.Gemma3Config(
        text_config=TEXT | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=127,
        boi_token_index=126,
        eoi_token_index=125,
    )
    return tf.Gemma3ForConditionalGeneration(config)


def llama4():
    changes = {
        "intermediate_size_mlp": 64,
        "num_local_experts": 2,
        "attention_chunk_size": 64,
        "no_rope_layers": [1, 0],
    }
    return tf.Llama4ForCausalLM(tf.Llama4TextConfig(**TEXT | changes))


def git():
    text = {key: TEXT[key] for key in TEXT if key not in ("num_key_value_heads", "head_dim")}
    return tf.GitForCausalLM(tf.GitConfig(vision_config=VISION, hidden_dropout_prob=0.0, **text))


def opt():
    return tf.OPTForCausalLM(tf.OPTConfig(**TEXT | {"ffn_dim": 64, "word_embed_proj_dim": 32}))


DECODERS = {
    gemma3: ("model.language_model", "layers"),
    llama4: ("model", "layers"),
    git: ("git", "encoder.layer"),
    opt: ("model.decoder", "layers"),
}


@pytest.fixture(params=DECODERS, ids=lambda make: make.__name__)
def make(request):
    torch.manual_seed(0)
    return request.param


def build(make):
    model = make().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch_of(ids):
    return collate([[Document(ids[0].int(), torch.tensor([0] + [1] * (ids.shape[1] - 1), dtype=torch.uint8))]], 0)


def test_the_decoder_is_that_of_the_text(make):
    """Not the model around it, nor the vision tower, which is deeper."""
    model, (decoder, blocks) = build(make), DECODERS[make]
    assert decoder_of(model) is model.get_submodule(decoder)
    assert find_blocks(model) is model.get_submodule(f"{decoder}.{blocks}")
    assert len(find_blocks(model)) == 2


def test_logps_are_those_of_the_model(make):
    """The decoder gets what the model around it would give it."""
    model, ids = build(make), torch.arange(3, 15)[None]
    policy = Policy(model)
    check_policy(policy, packing=False)
    actual = policy(batch_of(ids)).logps
    expected = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_checkpointing_and_freezing_reach_the_text(make):
    """Each block runs twice with checkpointing, and only blocks of the text are frozen."""
    model, calls = build(make), []
    blocks = find_blocks(model)
    inner = next(blocks[0].children())
    inner.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpoint_activations(model)
    Policy(model)(batch_of(torch.arange(3, 15)[None])).logps.sum().backward()
    assert len(calls) == 2
    freeze_layers(model, [0, 1], torch.float32)
    frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    assert frozen == {id(parameter) for parameter in blocks.parameters()}


def test_an_output_layer_called_decoder_is_not_one():
    """ModernBERT's `decoder` maps hidden states to logits."""
    config = tf.ModernBertDecoderConfig(**{k: TEXT[k] for k in TEXT if k not in ("num_key_value_heads", "head_dim")})
    model = tf.ModernBertDecoderForCausalLM(config)
    assert decoder_of(model) is model.model
