"""Tiny random models of any model type of transformers, from its config class."""

import re
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from tests.architectures.sizes import (
    DEPTH,
    FAMILIES,
    FIRST_TOKEN_ID,
    HEADS,
    LAYER_LISTS,
    LAYERS,
    SIZES,
    VOCABULARY,
)

LABELS = ["a", "b", "c"]
NOISE = 0.1  # standard deviation of what is added to weights, so that zeros, ones and biases count
# Buffers that are functions of the config.
COMPUTED = re.compile("inv_freq|slope_rate|decay|balancing|position_ids")


def tiny_causal_model(kind: str) -> PreTrainedModel:
    """Return a tiny causal language model of a model type."""
    torch.manual_seed(0)
    return _with_noise(AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32))


def tiny_classifier(kind: str) -> PreTrainedModel:
    """Return a tiny model with a head for `LABELS`."""
    torch.manual_seed(0)
    config = tiny_config(kind)
    config.id2label = dict(enumerate(LABELS))
    config.label2id = {label: i for i, label in enumerate(LABELS)}
    return _with_noise(AutoModelForSequenceClassification.from_config(config, dtype=torch.float32))


def tiny_config(kind: str) -> PreTrainedConfig:
    """Return the smallest config of a model type that still has each kind of layer."""
    return _shrink(CONFIG_MAPPING[kind])


def _shrink(cls: type[PreTrainedConfig]) -> PreTrainedConfig:
    given = FAMILIES.get(cls.model_type, {})
    default = vars(cls())
    n_layers = given.get("num_hidden_layers") or max(DEPTH, *(len(kinds) for kinds in _layer_kinds(default).values()))
    values, token_ids = {}, iter(range(VOCABULARY - 1, FIRST_TOKEN_ID, -1))
    for key, value in default.items():
        if key.startswith("_") or value is None:
            continue
        if isinstance(value, PreTrainedConfig):
            values[key] = _shrink(type(value)).to_dict()
        elif key in _layer_kinds(default):
            values[key] = (_layer_kinds(default)[key] * n_layers)[:n_layers]
        elif re.fullmatch(r".*_(token_id|token_index|pad_id)", key) and isinstance(value, int):
            values[key] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}.get(key) or (
                0 if key == "pad_token_id" else next(token_ids) if value >= FIRST_TOKEN_ID else value
            )
        elif (size := _size(key, value, n_layers)) is not None:
            values[key] = size
    # Some attention cannot share keys between heads, and its config has as many heads of keys as of queries.
    for key in ("num_key_value_heads", "num_kv_heads"):
        if key in values and default[key] == default.get("num_attention_heads"):
            values[key] = HEADS
    return cls(**values | given)


def _layer_kinds(default: dict[str, Any]) -> dict[str, list[str]]:
    """Return the distinct kinds of each list of layer types, in order."""
    lists = {key: value for key, value in default.items() if key in LAYER_LISTS and isinstance(value, (list, tuple))}
    return {key: list(dict.fromkeys(value)) for key, value in lists.items()} or {"": [""]}


def _size(key: str, value: Any, n_layers: int) -> Any:
    """Return the tiny value of a key, or None to leave it as it is."""
    if isinstance(value, float) and re.search("drop|jitter", key):
        return 0.0
    if isinstance(value, (str, bool, dict)):
        return None
    size = n_layers if re.fullmatch(LAYERS, key) else next((s for p, s in SIZES.items() if re.fullmatch(p, key)), None)
    if size is not None and isinstance(value, (list, tuple)):
        return [size] * (n_layers if len(value) > 1 else len(value))
    return size


@torch.no_grad()
def _with_noise(model: PreTrainedModel) -> PreTrainedModel:
    """Add noise to all weights, and to the buffers that are saved and not computed, such as the biases of routers."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    tensors |= {name: b for name, b in _saved_buffers(model).items() if not COMPUTED.search(name)}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.nan_to_num_(0.0, 1.0, -1.0)  # some weights are only allocated
            tensor.add_(NOISE * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def _saved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}
