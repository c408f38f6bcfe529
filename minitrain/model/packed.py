"""Weights packed in 4 or 8 bits with bitsandbytes, and the sizes of their tensors on the meta device."""

import copy
import logging
import math

import torch
from torch import Tensor, nn


def bitsandbytes():
    """Import and return bitsandbytes, without its warning about a kernel that it does not need here."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


def pack(weight: Tensor, bits: str, device: torch.device) -> nn.Parameter:
    """Return a packed weight on a device. The last dimension is that of the rows.

    `4bit` is NF4 with double quantization (QLoRA, arXiv 2305.14314). `8bit` has one scale per row, as in LLM.int8()
    (arXiv 2208.07339).
    """
    bnb, rows = bitsandbytes(), weight.detach().reshape(-1, weight.shape[-1])
    if bits == "4bit":
        packed = bnb.nn.Params4bit(rows, requires_grad=False, quant_type="nf4")
    else:
        packed = bnb.nn.Int8Params(rows, requires_grad=False, has_fp16_weights=False)
    return packed.to(device)


def unpack(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a weight of this shape, unpacked if it is packed."""
    type_name = type(weight).__name__
    if type_name == "Params4bit":
        # As one row: the CPU kernel of bitsandbytes uses a wrong scale for some row lengths (16 n, but not 64 n).
        state = copy.copy(weight.quant_state)
        state.shape = (1, weight.quant_state.shape.numel())
        return bitsandbytes().functional.dequantize_4bit(weight.data, state).view(shape)
    if type_name == "Int8Params":
        return (weight.data.float() * (weight.SCB / 127)[:, None]).view(shape)
    return weight


def is_quantized(parameter: Tensor | None) -> bool:
    return type(parameter).__name__ in ("Params4bit", "Int8Params")


def pack_on_meta(module: nn.Module, name: str, bits: str) -> None:
    """Replace a parameter with empty buffers of the sizes that bitsandbytes uses."""
    weight = module._parameters.pop(name)
    n, n_rows = weight.numel(), weight.numel() // weight.shape[-1]
    tensors = {"": (n, torch.int8), "_scales": (n_rows, torch.float32)}
    if bits == "4bit":  # 8-bit scales of 64 weights each, one scale per 256 scales, and both code books
        n_scales = math.ceil(n / 64)
        tensors = {"": (math.ceil(n / 2), torch.uint8), "_scales": (n_scales, torch.uint8)}
        tensors["_more"] = math.ceil(n_scales / 256) + 256 + 16 + 1, torch.float32
    for suffix, (size, dtype) in tensors.items():
        module.register_buffer(f"{name}{suffix}", torch.empty(size, dtype=dtype, device="meta"))


def unpack_on_meta(module: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an empty weight of this shape, like `unpack(...).to(dtype)` of a parameter of `pack_on_meta`."""
    scales = module.get_buffer(f"{name}_scales")
    unpacked = dtype if scales.dtype == torch.uint8 else torch.float32
    return scales.new_empty(shape, dtype=unpacked).to(dtype)
