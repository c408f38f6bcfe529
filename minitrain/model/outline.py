"""Build a policy on the meta device, without its weights: its layers, what is trained and how it attends."""

from pathlib import Path

import torch
from torch import nn

from minitrain.config.schema import Config, ModelConfig

from . import attention
from .adapter_config import has_adapter
from .adapter_files import outline_adapter
from .dequantize import describe_dequantized
from .diagnostics import check_missing_keys, describe_unused, model_load_error, named, refuse_encoder, without_head
from .load import DTYPES, freeze_layers, frozen_policy
from .policy import Policy
from .pretrained import attention_of, auto_class, quantization_of, read_model_config
from .quantize import outline_quantized
from .sequence_head import check_rows, make_policy, name_outputs
from .tiny import tiny_model
from .vocabulary import count_ids, resize_embeddings
from .weights import find_gaps, parameters_on_meta


def outline_policy(
    config: Config, tokenizer, outputs: list[str] | None = None, value_head: bool = False, packed: bool = False
) -> Policy:
    """Build the policy that `load_policy` loads and the trainer freezes, from the model's config only.

    Args:
        config: The full config.
        tokenizer: The tokenizer that the model is trained with.
        outputs: Labels of a scalar head; None builds a causal LM.
        value_head: Add a value head next to the LM head.
        packed: Give quantized layers the sizes that they have after quantization, not before.

    Raises:
        ConfigError: The model or its adapter cannot be built.
    """
    compute = DTYPES[config.model.policy_dtype]
    dtype = compute if has_adapter(config) else DTYPES[config.model.master_dtype]
    with parameters_on_meta():
        model = _outline(config.model, tokenizer, dtype, outputs)
        if packed and config.model.quantization != "none":
            outline_quantized(model, config.model.quantization, compute)
        if has_adapter(config):
            model.adapter = outline_adapter(config, model)
            model.adapter.freeze(model, compute)
        policy = make_policy(model)
        check_rows(model, config.packing)
        if value_head:
            policy.add_value_head()
    freeze_layers(model, config.freeze_layers, compute)
    if config.packing:
        attention.attend_by_document(model)
    return policy


def outline_frozen(config: ModelConfig, tokenizer, dtype: torch.dtype, packing: bool, residual: torch.dtype) -> Policy:
    """Build the policy that `load_frozen` loads, from the model's config only."""
    with parameters_on_meta():
        model = _outline(config, tokenizer, dtype, None)
    return frozen_policy(model, dtype, packing, residual)


def _outline(config: ModelConfig, tokenizer, dtype: torch.dtype, outputs: list[str] | None) -> nn.Module:
    """Build what `load_model` loads. Its buffers are real, in their own dtype.

    The attribute `load_notes` has the lines that are logged when the model is loaded.
    """
    kind, number = auto_class(outputs)
    trust = {"trust_remote_code": config.trust_remote_code}
    try:
        if config.name_or_path == "tiny":
            shape = tiny_model(0, count_ids(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id).config
            shape.num_labels = number.get("num_labels", shape.num_labels)
        else:
            shape = read_model_config(config, **number)
            if outputs is None:
                refuse_encoder(shape)
        model = kind.from_config(shape, dtype=torch.float32, attn_implementation=attention_of(config), **trust)
        if quantization := quantization_of(shape):
            gaps, notes = None, [describe_dequantized(model, quantization, dtype)]
        else:
            gaps = find_gaps(Path(config.name_or_path), model)
            notes = describe_unused(without_head(gaps["unexpected_keys"], outputs))
    except Exception as error:
        raise model_load_error(config, named(outputs), error) from None
    if gaps is not None:
        check_missing_keys(config, gaps, outputs)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if outputs is not None:
        new = ["score.weight"] if config.name_or_path == "tiny" else [] if gaps is None else gaps["missing_keys"]
        name_outputs(model, outputs, tokenizer.pad_token_id, new)
    resize_embeddings(model, tokenizer)
    model.load_notes = notes
    return model
