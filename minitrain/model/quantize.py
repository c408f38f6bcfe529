"""Quantize frozen weights to 4 or 8 bits with bitsandbytes (the extra `quant`)."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, which imports the compiler at once

from .sequence_head import heads_of


def quantize_model(model: nn.Module, bits: str, dtype: torch.dtype, device: torch.device) -> None:
    """Replace all linear layers except the head with quantized ones.

    Args:
        model: The transformers model.
        bits: `4bit` is NF4 with double quantization (QLoRA, arXiv 2305.14314). `8bit` has one scale for each row of a
            weight, as in LLM.int8() (arXiv 2208.07339).
        dtype: Dtype of the computation.
        device: Device of the layers; moving them packs the weights. On the meta device, tensors have the right sizes.
    """
    if device.type == "meta":
        for module in quantizable(model).values():
            _quantize_on_meta(module, bits, dtype)
        return
    import bitsandbytes as bnb

    for name, module in quantizable(model).items():
        layer = QuantizedLinear(module.in_features, module.out_features, bias=False, device="meta")
        if bits == "4bit":
            packed = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
        else:
            packed = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
        layer.weight, layer.dtype = packed.to(device), dtype
        layer.bias = None if module.bias is None else nn.Parameter(module.bias.data.to(device))
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)


class QuantizedLinear(nn.Linear):
    """A linear layer that computes in `dtype` with a frozen weight, unpacked for each product.

    It replaces the layers of bitsandbytes, which change their parameters: Linear4bit repacks its weight in eval mode on
    CPUs with AVX512-BF16, and both cast a trained bias. On CPUs, Linear8bitLt rounds its input to 8 bits, but only in
    eval mode.
    """

    dtype: torch.dtype

    def forward(self, x: Tensor) -> Tensor:
        y = _QuantizedProduct.apply(x.to(self.dtype), self)
        return (y if self.bias is None else y + self.bias.to(y.dtype)).to(x.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the unpacked weight, shape [out, in]."""
        return dequantized(self).to(dtype)


class _QuantizedProduct(torch.autograd.Function):
    """Compute x W^T. The backward pass unpacks the weight again."""

    @staticmethod
    @_disable_dynamo
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.dense(x.dtype))

    @staticmethod
    @_disable_dynamo
    def backward(ctx, grad):
        return grad @ ctx.layer.dense(grad.dtype), None


def quantizable(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers by name, except the head."""
    excluded = {module for name in heads_of(model).trained for module in model.get_submodule(name).modules()}
    excluded.add(model.get_output_embeddings())
    modules = dict(model.named_modules())
    return {name: module for name, module in modules.items() if type(module) is nn.Linear and module not in excluded}


def dequantize_model(model: nn.Module) -> None:
    """Replace quantized layers with ordinary ones in float32, with the rounded weights."""
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
    """Return the weight of a layer, unpacked if it is packed, shape [out, in]."""
    weight = module.weight
    type_name = type(weight).__name__
    if type_name == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        # As one row: the CPU kernel of bitsandbytes uses a wrong scale for some row lengths (16 n, but not 64 n).
        state = copy.copy(weight.quant_state)
        state.shape = (1, weight.quant_state.shape.numel())
        return dequantize_4bit(weight.data, state).view(weight.quant_state.shape)
    if type_name == "Int8Params":
        return weight.data.float() * (weight.SCB / 127)[:, None]
    return weight


def _quantize_on_meta(module: nn.Linear, bits: str, dtype: torch.dtype) -> None:
    """Replace the weight of a layer with empty tensors of the sizes that bitsandbytes uses."""
    n, n_rows = module.weight.numel(), module.out_features
    del module.weight
    module.__class__, module.dtype = _MetaQuantizedLinear, dtype
    module.unpacked = dtype if bits == "4bit" else torch.float32
    tensors = {"weight": (n, torch.int8), "scales": (n_rows, torch.float32)}
    if bits == "4bit":  # 8-bit scales of 64 weights each, one scale per 256 scales, and both code books
        n_scales = math.ceil(n / 64)
        tensors = {"weight": (math.ceil(n / 2), torch.uint8), "scales": (n_scales, torch.uint8)}
        tensors["more"] = math.ceil(n_scales / 256) + 256 + 16 + 1, torch.float32
    for name, (size, tensor_dtype) in tensors.items():
        module.register_buffer(name, torch.empty(size, dtype=tensor_dtype, device="meta"))


class _MetaQuantizedLinear(QuantizedLinear):
    """A quantized layer on the meta device."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.scales.new_empty(self.out_features, self.in_features, dtype=self.unpacked).to(dtype)
