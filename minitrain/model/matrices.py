"""Which share of a model's matrices is adapted, trained, frozen and quantized.

transformers stores the experts of a layer as one parameter [experts, out, in], which is not a linear layer. So LoRA on
all linear layers can leave most of a model unchanged, and quantization can leave most of it unpacked.
"""

import re
from collections.abc import Iterable

from torch import nn

from . import experts
from .quantize import quantizable
from .sequence_head import heads_of

MAX_NAMES = 6


def matrix_sizes(model: nn.Module) -> dict[str, int]:
    """Return the number of weights of each matrix or stack of matrices, except embeddings and heads, by name."""
    heads = [model.get_output_embeddings(), *map(model.get_submodule, heads_of(model).trained)]
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    excluded = {id(p) for module in (*heads, *embeddings) if module is not None for p in module.parameters()}
    return {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if sum(size > 1 for size in parameter.shape) > 1 and id(parameter) not in excluded and not name.endswith("bias")
    }


def quantized_names(model: nn.Module) -> set[str]:
    """Return the names of the parameters that `quantize_model` packs."""
    return set(quantizable(model))


def describe_matrices(model: nn.Module, sizes: dict[str, int], quantized: set[str]) -> str:
    """Return the shares of the weights in matrices in words: `10.3% adapted, 89.7% frozen (mlp.experts.down_proj)`.

    Args:
        model: The model with its adapter and frozen layers.
        sizes: Its `matrix_sizes` before it was quantized.
        quantized: Names of the quantized parameters.
    """
    adapter = getattr(model, "adapter", None)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad} & sizes.keys()
    adapted = set()
    if adapter is not None:
        adapted = {*(f"{name}.weight" for name in adapter.layers), *adapter.experts} - trained
    frozen = [name for name in sizes if name not in adapted and name not in trained]
    parts = [
        _share("adapted", adapted, sizes),
        _share("trained", trained, sizes),
        _share("frozen", frozen, sizes, frozen),
        _share("quantized", quantized, sizes, [name for name in sizes if name not in quantized]),
    ]
    hint = ""
    if adapted and set(experts.find_experts(model)) & set(frozen):
        hint = f"; lora.target_parameters={experts.ALL} adapts the experts"
    return ", ".join(filter(None, parts)) + hint


def _share(verb: str, names: Iterable[str], sizes: dict[str, int], listed: Iterable[str] = ()) -> str:
    """Return, for example, `14.1% quantized (not mlp.experts.down_proj)`; empty if the share is 0."""
    total = sum(sizes.values())
    share = sum(sizes[name] for name in names if name in sizes) / max(total, 1)
    if not share:
        return ""
    by_kind: dict[str, int] = {}
    for name in listed:
        kind = ".".join(re.split(r"\.\d+\.", name)[-1].removesuffix(".weight").split(".")[-3:])
        by_kind[kind] = by_kind.get(kind, 0) + sizes[name]
    kinds = sorted(by_kind, key=by_kind.get, reverse=True)
    others = f" and {len(kinds) - MAX_NAMES} more" if len(kinds) > MAX_NAMES else ""
    shown = f" ({'not ' * (verb == 'quantized')}{', '.join(kinds[:MAX_NAMES])}{others})" if kinds and share < 1 else ""
    return f"{share:.1%} {verb}{shown}"
