"""A policy without its weights, on the meta device: what it is made of, how much of it is trained, how it attends."""

import torch
from torch import nn

from ..hub import ask_for
from ..schema import Config, ModelConfig
from . import attention
from .adapter_files import has_adapter, outline_adapter
from .damage import named, no_model, refuse_encoder
from .load import DTYPES, attention_of, auto_class, freeze_layers, grow_embeddings
from .policy import Policy
from .scoring import make_policy, name_outputs
from .tiny import tiny_model
from .weights import parameters_on_meta


def outline_policy(config: Config, tokenizer, outputs: list[str] | None = None, value_head: bool = False) -> Policy:
    """The policy that `load_policy` loads and the trainer freezes, from the model's config alone. Raises ConfigError.

    Its parameters are on the meta device, those that quantisation would pack as they are.
    """
    compute = DTYPES[config.model.policy_dtype]
    with parameters_on_meta():
        model = _outline(config.model, tokenizer, outputs)
        if outputs is not None:
            name_outputs(model, outputs, tokenizer.pad_token_id, [])
        grow_embeddings(model, len(tokenizer))
        if has_adapter(config):
            model.adapter = outline_adapter(config, model)
            model.adapter.freeze(model, compute)
        policy = make_policy(model)
        if value_head:
            policy.add_value_head()
    freeze_layers(model, config.freeze_layers, compute)
    if config.packing:
        attention.attend_by_document(model)
    return policy


def _outline(config: ModelConfig, tokenizer, outputs: list[str] | None) -> nn.Module:
    from transformers import AutoConfig

    kind, number = auto_class(outputs)
    trust = {"trust_remote_code": config.trust_remote_code}
    try:
        if config.name_or_path == "tiny":
            shape = tiny_model(0, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id).config
            shape.num_labels = number.get("num_labels", shape.num_labels)
        else:
            ask_for(config.name_or_path)
            shape = AutoConfig.from_pretrained(config.name_or_path, revision=config.revision, **trust, **number)
        if outputs is None:
            refuse_encoder(shape)
        return kind.from_config(shape, dtype=torch.float32, attn_implementation=attention_of(config), **trust)
    except Exception as error:
        raise no_model(config, named(outputs), error) from None
