"""Frozen weights in 4 or 8 bits by bitsandbytes (the extra `quant`); what is trained lies beside them in float32."""

import logging

import torch
from torch import Tensor, nn

from .scoring import heads_of


def quantize_model(model: nn.Module, bits: str, dtype: torch.dtype, device: torch.device) -> None:
    """Replaces the linear layers, all but the output layer or head, and moves them to `device`, which packs weights.

    4bit is NF4 with double quantisation (QLoRA, arXiv 2305.14314), computed in `dtype`; 8bit is LLM.int8()
    (arXiv 2208.07339).
    """
    import bitsandbytes as bnb

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of each cast in each step
    kept = {part for name in heads_of(model).trained for part in model.get_submodule(name).modules()}
    kept.add(model.get_output_embeddings())
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module in kept:
            continue
        sizes, bias = (module.in_features, module.out_features), module.bias is not None
        if bits == "4bit":
            layer = bnb.nn.Linear4bit(*sizes, bias, compute_dtype=dtype, quant_type="nf4", device="meta")
            layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
        else:
            layer = bnb.nn.Linear8bitLt(*sizes, bias, has_fp16_weights=False, device="meta")
            layer.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
        layer.bias = module.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.to(device))


def unpack_model(model: nn.Module) -> None:
    """Ordinary linear layers again, in float32, with the weights as quantisation has rounded them."""
    for name, module in list(model.named_modules()):
        if not is_quantized(getattr(module, "weight", None)):
            continue
        layer = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        layer.weight = nn.Parameter(dequantized(module).float())
        layer.bias = module.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)


def is_quantized(parameter: Tensor) -> bool:
    return type(parameter).__name__ in ("Params4bit", "Int8Params")


def dequantized(module: nn.Module) -> Tensor:
    """The weight of a layer, made whole again where it was packed."""
    weight = module.weight
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if kind == "Int8Params":
        scales = module.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.float() * (scales / 127)[:, None]
    return weight
