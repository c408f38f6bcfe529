"""Prompt and prefix tuning: trained vectors in front of every document of a frozen model.

prompt: n embedding vectors (Lester et al. 2021, arXiv 2104.08691). prefix: n keys and values in the attention of each
layer (Li and Liang 2021, arXiv 2101.00190); with `prefix_projection` a small network computes them, which is dropped
after training. The layout is that of PEFT.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from minitrain.config.sections import SoftPromptConfig

from . import token_rows
from .adapter import Adapter
from .sequence_head import heads_of

TENSOR = "prompt_embeddings"  # its name in PEFT's files
PEFT_TYPES = {"prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}


class SoftPrompt(nn.Module):
    """The trained vectors. It is a submodule of the model, so that a sharding wrapper finds its parameters."""

    def __init__(self, model: nn.Module, options: SoftPromptConfig, seed: int):
        super().__init__()
        config = model.config.get_text_config()
        self.method, self.n_tokens = options.method, options.num_virtual_tokens
        self.n_layers, width = config.num_hidden_layers, config.hidden_size
        heads = config.num_attention_heads
        self.heads = getattr(config, "num_key_value_heads", None) or heads
        self.head_dim = getattr(config, "head_dim", None) or width // heads
        keys = self.heads * self.head_dim  # size of the keys of one layer and token
        columns = width if self.method == "prompt" else keys if options.prefix_projection else 2 * self.n_layers * keys
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.02 * torch.randn(*shape, generator=generator))

        self.weight = normal(self.n_tokens, columns)  # [n, columns]
        self.projection = None
        if self.method == "prefix" and options.prefix_projection:
            hidden = options.encoder_hidden_size or width
            self.projection = nn.Sequential(
                nn.Linear(keys, hidden), nn.Tanh(), nn.Linear(hidden, 2 * self.n_layers * keys)
            )
            for layer in (self.projection[0], self.projection[2]):
                layer.weight, layer.bias = normal(*layer.weight.shape), nn.Parameter(torch.zeros_like(layer.bias))

    def vectors(self) -> Tensor:
        """Return the vectors that PEFT saves, shape [n, H] or [n, 2 * layers * heads * head_dim]."""
        return self.weight if self.projection is None else self.projection(self.weight)

    def forward(self, ids: Tensor, embeddings: nn.Module, dtype: torch.dtype, fixed: bool = True) -> dict[str, Any]:
        """Return the inputs of the backbone that replace `input_ids`.

        Args:
            ids: Token ids, shape [R, T].
            embeddings: The input embeddings.
            dtype: Dtype of keys and values.
            fixed: Keep the size of the cache of keys and values, since activation checkpointing updates it twice.
        """
        vectors, rows = self.vectors(), len(ids)
        if self.method == "prompt":
            embedded = embeddings(ids)  # [R, T, H]
            before = vectors.to(embedded.dtype).expand(rows, -1, -1)  # [R, n, H]
            return {"inputs_embeds": torch.cat([before, embedded], 1)}
        pairs = vectors.to(dtype).view(self.n_tokens, self.n_layers, 2, self.heads, self.head_dim)
        pairs = (
            pairs.permute(1, 2, 3, 0, 4).unsqueeze(2).expand(-1, -1, rows, -1, -1, -1)
        )  # [layers, 2, R, heads, n, d]
        cache = DynamicCache([(keys, values) for keys, values in pairs])
        if fixed:
            for layer in cache.layers:
                layer.__class__ = _FixedLayer
        return {"input_ids": ids, "past_key_values": cache}

    @property
    def n_before(self) -> int:
        """Return the number of positions that the prompt adds to the backbone's output."""
        return self.n_tokens if self.method == "prompt" else 0


class _FixedLayer(DynamicLayer):
    """Keys and values in front of others that do not grow, since activation checkpointing updates a layer twice."""

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, keys], -2), torch.cat([self.values, values], -2)


class PromptAdapter(Adapter):
    """The adapter of a model with a `SoftPrompt`."""

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        prefixes = ("soft_prompt.", *(f"{name}." for name in self.modules_to_save))
        rows = f".{token_rows.NAME}"
        return {name: p for name, p in model.named_parameters() if name.startswith(prefixes) or name.endswith(rows)}


def prompt_config(options: SoftPromptConfig, model: nn.Module, base: dict[str, Any]) -> dict[str, Any]:
    """Return adapter_config.json in PEFT's format."""
    prompt, config = model.soft_prompt, model.config.get_text_config()
    config_json = base | ({"modules_to_save": heads_of(model).trained} if heads_of(model).trained else {})
    config_json |= {
        "peft_type": PEFT_TYPES[options.method],
        "num_virtual_tokens": prompt.n_tokens,
        "num_layers": prompt.n_layers,
        "num_attention_heads": prompt.heads if options.method == "prefix" else config.num_attention_heads,
        "token_dim": prompt.heads * prompt.head_dim if options.method == "prefix" else config.hidden_size,
        "num_transformer_submodules": 1,
    }
    if options.method == "prompt":
        return config_json | {"prompt_tuning_init": "RANDOM"}
    return config_json | {"prefix_projection": False}  # the saved vectors are projected


def vectors_of(tensors: dict[str, Tensor]) -> Tensor:
    """Return `SoftPrompt.vectors` from unsharded tensors by their names in the model."""
    named = {name.removeprefix("soft_prompt."): tensor for name, tensor in tensors.items()}
    vectors = named["weight"]
    if "projection.0.weight" in named:
        inner = torch.tanh(F.linear(vectors, named["projection.0.weight"], named["projection.0.bias"]))
        vectors = F.linear(inner, named["projection.2.weight"], named["projection.2.bias"])
    return vectors.contiguous()
