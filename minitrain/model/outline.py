"""A policy without its weights, on the meta device: what it is made of, how much of it is trained, how it attends."""

import torch
from torch import nn

from ..errors import ConfigError
from ..schema import Config, ModelConfig
from . import attention
from .adapter_files import has_adapter, outline_adapter
from .load import DTYPES, attention_of, first_line, freeze_layers, grow_embeddings
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
    if config.packing and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(attention.NAME)
    return policy


def _outline(config: ModelConfig, tokenizer, outputs: list[str] | None) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForCausalLM if outputs is None else AutoModelForSequenceClassification
    number = {} if outputs is None else {"num_labels": len(outputs)}
    trust = {"trust_remote_code": config.trust_remote_code}
    try:
        if config.name_or_path == "tiny":
            shape = tiny_model(0, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id).config
            shape.num_labels = number.get("num_labels", shape.num_labels)
        else:
            shape = AutoConfig.from_pretrained(config.name_or_path, revision=config.revision, **trust, **number)
        dtype = torch.float32
        return kind.from_config(shape, dtype=dtype, attn_implementation=attention_of(config), **trust)
    except Exception as error:
        wanted = "causal language model" if outputs is None else f"model with {len(outputs)} outputs"
        raise ConfigError(f"no {wanted} in {config.name_or_path!r}: {first_line(error)}") from None
