"""Tiny random multimodal models, with a vision tower of one or two layers."""

import torch
import transformers as tf

from tests.shapes import SHAPE

TEXT = SHAPE | {"vocab_size": 288, "intermediate_size": 48, "head_dim": 8}
VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
QWEN_VISION = dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32)
IDS = dict(image_token_id=280, video_token_id=281, vision_start_token_id=282, vision_end_token_id=283)
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def gemma3():
    vision = VISION | {"image_size": 16, "patch_size": 8}
    text = TEXT | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=280)
    return tf.Gemma3ForConditionalGeneration(config)


def qwen3_5():
    linear = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
    text = TEXT | linear | {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
    return tf.Qwen3_5ForConditionalGeneration(tf.Qwen3_5Config(text_config=text, vision_config=QWEN_VISION, **IDS))


def qwen2_5_vl():
    text = {key: value for key, value in TEXT.items() if key != "head_dim"} | {"rope_parameters": MROPE}
    vision = QWEN_VISION | {"fullatt_block_indexes": [0]}
    return tf.Qwen2_5_VLForConditionalGeneration(tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **IDS))


def mistral3():
    vision = tf.PixtralVisionConfig(**VISION, image_size=16, patch_size=8)
    config = tf.Mistral3Config(text_config=tf.MistralConfig(**TEXT), vision_config=vision, image_token_index=280)
    return tf.Mistral3ForConditionalGeneration(config)


def llama4():
    experts = dict(num_local_experts=2, intermediate_size_mlp=48, interleave_moe_layer_step=2, moe_layers=[1])
    kinds = dict(no_rope_layers=[1, 0], layer_types=["chunked_attention", "full_attention"], attention_chunk_size=8)
    vision = VISION | dict(image_size=16, patch_size=8, projector_input_dim=16, projector_output_dim=16)
    vision |= dict(vision_output_dim=16, pixel_shuffle_ratio=0.5, rope_theta=10000.0)
    return tf.Llama4ForConditionalGeneration(
        tf.Llama4Config(text_config=TEXT | experts | kinds, vision_config=vision, image_token_index=280)
    )


def mllama():
    text = {key: value for key, value in TEXT.items() if key != "head_dim"} | {"cross_attention_layers": [1]}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "num_hidden_layers": 3}
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_global_layers=1, attention_heads=2)
    vision |= dict(image_size=16, patch_size=8, vision_output_dim=32, intermediate_layers_indices=[0])
    vision |= dict(supported_aspect_ratios=[[1, 1]], max_num_tiles=1)
    return tf.MllamaForConditionalGeneration(
        tf.MllamaConfig(text_config=text, vision_config=vision, image_token_index=280)
    )


MODELS = {
    "gemma3": gemma3,
    "qwen3_5": qwen3_5,
    "qwen2_5_vl": qwen2_5_vl,
    "mistral3": mistral3,
    "llama4": llama4,
    "mllama": mllama,
}


def multimodal_model(name: str):
    """Return a random model, whose values are large enough to matter."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()
