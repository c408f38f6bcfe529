"""Dequantize checkpoints to ordinary tensors: block-wise FP8, MXFP4, and 4-bit and 8-bit bitsandbytes.

It does not use the quantizers of transformers: these keep packed weights, which a cast or a save destroys. They also
infer the size of FP8 blocks from the number of scales, which is wrong if a matrix ends within a block.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from minitrain.errors import ConfigError

from .packed import bitsandbytes
from .weights import open_files

Read = Callable[[str], Tensor]  # key -> tensor
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # e2m1
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
PACKED = (*FP8, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.int8, torch.uint8)


def method_of(quantization: dict) -> str:
    """Return the quantization method of a quantization_config.

    Raises:
        ConfigError: `dequantized` does not support the method.
    """
    bits = quantization.get("load_in_4bit") or quantization.get("load_in_8bit")
    method = quantization.get("quant_method", "bitsandbytes" if bits else None)
    if method not in METHODS:
        raise ConfigError(
            f"its weights are quantized with an unsupported quant_method, got {method!r}. Use an unquantized model, "
            f"or one with {', '.join(METHODS)}.",
            "unsupported-model",
        )
    if method == "bitsandbytes" and find_spec("bitsandbytes") is None:
        raise ConfigError(
            "its weights are quantized with bitsandbytes, which is not installed. Run pip install bitsandbytes.",
            "not-installed",
        )
    return method


def dequantized(paths: Iterable[Path], quantization: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the dequantized tensors of safetensors files by name, floating-point ones in `dtype`.

    Raises:
        ConfigError: A tensor cannot be dequantized.
    """
    files = open_files(paths)
    if not files:
        raise ConfigError(
            "its weights are quantized, but not in safetensors files. Convert them to safetensors.",
            "unsupported-model",
        )
    tensors = {}
    for name, tensor in METHODS[method_of(quantization)](
        files.keys(), lambda key: files[key].get_tensor(key), quantization
    ):
        if tensor.dtype in PACKED:
            raise ConfigError(f"{name} has an unsupported quantized dtype, got {tensor.dtype}.", "unsupported-model")
        tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return tensors


def describe_dequantized(model: nn.Module, quantization: dict, dtype: torch.dtype) -> str:
    """Return a line about the dtype and memory of the dequantized weights of a model."""
    mib = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize / 2**20
    name = str(dtype).removeprefix("torch.")
    return f"its {method_of(quantization)} weights are dequantized on loading to {name}, which takes {mib:,.1f} MiB"


def _fp8(keys: Iterable[str], read: Read, quantization: dict) -> Iterator[tuple[str, Tensor]]:
    """Dequantize FP8: `NAME_scale_inv` has a factor for each block of NAME.

    Scales of activations are dropped: only FP8 products need them.
    """
    for key in keys:
        if key.endswith(("_scale_inv", ".activation_scale", ".input_scale")):
            continue
        tensor = read(key)
        if f"{key}_scale_inv" in keys and tensor.dtype in FP8:
            tensor = _scale_blocks(key, tensor, read(f"{key}_scale_inv"), quantization.get("weight_block_size"))
        yield key, tensor


def _scale_blocks(name: str, weight: Tensor, scales: Tensor, block: list[int] | None) -> Tensor:
    """Multiply each block of a weight [..., rows, columns] by its scale; blocks at the edges can be partial."""
    if scales.numel() == 1:
        return weight.float() * scales.float().view(())
    rows, columns = weight.shape[-2:]
    expected = block and (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    if expected != tuple(scales.shape[-2:]) or not scales.is_floating_point():
        got = f"{list(scales.shape)} scales ({scales.dtype}) and weight_block_size {block}"
        raise ConfigError(f"{name} of shape {list(weight.shape)} does not match its {got}.", "mismatch")
    scales = scales.float().repeat_interleave(block[0], -2)[..., :rows, :]
    return weight.float() * scales.repeat_interleave(block[1], -1)[..., :columns]


def _mxfp4(keys: Iterable[str], read: Read, quantization: dict) -> Iterator[tuple[str, Tensor]]:
    """Dequantize MXFP4: `NAME_blocks` [E, columns, G, 16] has two values per byte, low bits first.

    `NAME_scales` [E, columns, G] has exponents.
    """
    for key in keys:
        name = key.removesuffix("_blocks")
        if f"{name}_scales" in keys and name != key:
            blocks = read(key)
            table = torch.tensor(FP4)
            values = torch.stack([table[(blocks & 15).int()], table[(blocks >> 4).int()]], -1).flatten(-2)
            exponents = read(f"{name}_scales").int() - 127  # [E, columns, G]
            yield name, torch.ldexp(values, exponents[..., None]).flatten(-2).transpose(-1, -2)  # [E, rows, columns]
        elif not (key.endswith("_scales") and f"{key.removesuffix('_scales')}_blocks" in keys):
            yield key, read(key)


def _bitsandbytes(keys: Iterable[str], read: Read, quantization: dict) -> Iterator[tuple[str, Tensor]]:
    """Dequantize bitsandbytes: 4-bit NAME has a state in NAME.absmax and others, 8-bit M.weight has scales in M.SCB."""
    functional = bitsandbytes().functional
    states: dict[str, dict[str, str]] = {
        key.partition(".quant_state.")[0]: {} for key in keys if ".quant_state." in key
    }
    for key in keys:
        name = next((name for name in _parents(key) if name in states), None)
        if name is not None:
            states[name][key.removeprefix(f"{name}.")] = key
    state_keys = {key for keys_of_name in states.values() for key in keys_of_name.values()}
    for key in keys:
        scales = f"{key.removesuffix('weight')}SCB"
        if key in state_keys or key.endswith((".SCB", ".weight_format")):
            continue
        if key in states:
            state = functional.QuantState.from_dict({k: read(v) for k, v in states[key].items()}, torch.device("cpu"))
            state.dtype = torch.float32
            yield key, functional.dequantize_4bit(read(key), state)
        elif scales in keys:
            yield key, read(key).float() * (read(scales).float() / 127)[:, None]
        else:
            yield key, read(key)


def _parents(key: str) -> Iterator[str]:
    """Yield the parents of a dotted key: `a.b` and `a` for `a.b.c`."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


METHODS = {"fp8": _fp8, "mxfp4": _mxfp4, "bitsandbytes": _bitsandbytes}
