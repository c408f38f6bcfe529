"""Build a policy on the meta device, without its weights: its layers, what is trained and how it attends."""

from pathlib import Path

import torch
from torch import nn

from minitrain.config.schema import Config, ModelConfig

from . import attention
from .adapter_config import has_adapter
from .adapter_files import adapt_meta_model
from .dequantize import describe_dequantized
from .diagnostics import (
    check_is_decoder,
    check_missing_keys,
    describe_head,
    describe_unused,
    drop_head_keys,
    model_load_error,
)
from .load import DTYPES, freeze_layers, frozen_policy
from .policy import Policy
from .pretrained import attention_of, auto_class, quantization_of, read_model_config
from .quantize import quantize_meta_model
from .sequence_head import check_can_pack, make_policy, name_outputs
from .tiny import tiny_model
from .vocabulary import count_ids, resize_embeddings
from .weights import find_gaps, parameters_on_meta


def build_meta_policy(
    config: Config, tokenizer, outputs: list[str] | None = None, value_head: bool = False, quantized: bool = False
) -> Policy:
    """Build the policy that `load_policy` loads and the trainer freezes, from the model's config only.

    Args:
        config: The full config.
        tokenizer: The tokenizer that the model is trained with.
        outputs: Labels of a scalar head; None builds a causal LM.
        value_head: Add a value head next to the LM head.
        quantized: Give quantized layers the sizes that they have after quantization, not before.

    Raises:
        ConfigError: The model or its adapter cannot be built.
    """
    compute_dtype = DTYPES[config.model.policy_dtype]
    dtype = compute_dtype if has_adapter(config) else DTYPES[config.model.master_dtype]
    with parameters_on_meta():
        model = _build_meta_model(config.model, tokenizer, dtype, outputs)
        if quantized and config.model.quantization != "none":
            quantize_meta_model(model, config.model.quantization, compute_dtype)
        if has_adapter(config):
            model.adapter = adapt_meta_model(config, model)
            model.adapter.freeze(model, compute_dtype)
        policy = make_policy(model)
        check_can_pack(model, config.packing)
        if value_head:
            policy.add_value_head()
    freeze_layers(model, config.freeze_layers, compute_dtype)
    if config.packing:
        attention.attend_by_document(model)
    return policy


def build_meta_frozen(
    config: ModelConfig, tokenizer, dtype: torch.dtype, packing: bool, residual: torch.dtype
) -> Policy:
    """Build the policy that `load_frozen` loads, from the model's config only."""
    with parameters_on_meta():
        model = _build_meta_model(config, tokenizer, dtype, None)
    return frozen_policy(model, dtype, packing, residual)


def _build_meta_model(config: ModelConfig, tokenizer, dtype: torch.dtype, outputs: list[str] | None) -> nn.Module:
    """Build what `load_model` loads. Its buffers are real, in their own dtype.

    The attribute `load_notes` has the lines that are logged when the model is loaded.
    """
    model_class, class_kwargs = auto_class(outputs)
    trust = {"trust_remote_code": config.trust_remote_code}
    try:
        if config.name_or_path == "tiny":
            hf_config = tiny_model(0, count_ids(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id).config
            hf_config.num_labels = class_kwargs.get("num_labels", hf_config.num_labels)
        else:
            hf_config = read_model_config(config, **class_kwargs)
            if outputs is None:
                check_is_decoder(hf_config)
        model = model_class.from_config(
            hf_config, dtype=torch.float32, attn_implementation=attention_of(config), **trust
        )
        if quantization := quantization_of(hf_config):
            gaps, notes = None, [describe_dequantized(model, quantization, dtype)]
        else:
            gaps = find_gaps(Path(config.name_or_path), model)
            notes = describe_unused(drop_head_keys(gaps["unexpected_keys"], outputs))
    except Exception as error:
        raise model_load_error(config, describe_head(outputs), error) from None
    if gaps is not None:
        check_missing_keys(config, gaps, outputs)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if outputs is not None:
        missing = ["score.weight"] if config.name_or_path == "tiny" else [] if gaps is None else gaps["missing_keys"]
        name_outputs(model, outputs, tokenizer.pad_token_id, missing)
    resize_embeddings(model, tokenizer)
    model.load_notes = notes
    return model
