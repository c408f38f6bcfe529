"""Frozen weights in 4 or 8 bits by bitsandbytes (the extra `quant`); what is trained lies beside them in float32."""

import logging
import math

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
    for name, module in _quantizable(model).items():
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


def _quantizable(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers by name, all but the output layer or head."""
    kept = {part for name in heads_of(model).trained for part in model.get_submodule(name).modules()}
    kept.add(model.get_output_embeddings())
    found = dict(model.named_modules())
    return {name: module for name, module in found.items() if type(module) is nn.Linear and module not in kept}


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


def outline_quantized(model: nn.Module, bits: str, dtype: torch.dtype) -> None:
    """What `quantize_model` makes of a model, as far as memory goes, on the device of its weights, without values."""
    for module in _quantizable(model).values():
        sizes, device = module.weight.shape, module.weight.device
        del module.weight
        module.__class__ = _Outlined
        n, module.computes = sizes.numel(), dtype if bits == "4bit" else None
        tensors = {"weight": (n, torch.int8), "scales": (sizes[0], torch.float32)}
        if bits == "4bit":  # scales of 64 weights each in 8 bits, scales of 256 of these, and both code books
            n_scales = math.ceil(n / 64)
            tensors = {"weight": (math.ceil(n / 2), torch.uint8), "scales": (n_scales, torch.uint8)}
            tensors["more"] = math.ceil(n_scales / 256) + 256 + 16 + 1, torch.float32
        for name, (size, kind) in tensors.items():
            module.register_buffer(name, torch.empty(size, dtype=kind, device=device))


class _Outlined(nn.Linear):
    """Makes and keeps tensors as bitsandbytes' linear layers do."""

    def forward(self, x: Tensor) -> Tensor:
        y = _OutlinedLinear.apply(x.to(self.computes or x.dtype), self.out_features, self.computes is None)
        return (y if self.bias is None else y + self.bias.to(y.dtype)).to(x.dtype)


class _OutlinedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, out_features, keeps_input):
        whole = x.new_empty(out_features, x.shape[-1])  # the weight made whole again
        ctx.save_for_backward(x if keeps_input else None)
        ctx.in_features, ctx.out_features = x.shape[-1], out_features
        return x @ whole.T

    @staticmethod
    def backward(ctx, grad):
        return grad @ grad.new_empty(ctx.out_features, ctx.in_features), None, None
