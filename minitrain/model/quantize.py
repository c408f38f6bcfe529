"""Quantize frozen weights to 4 or 8 bits with bitsandbytes (the extra `quant`)."""

import functools
import inspect
import re
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, which imports the compiler at once
from transformers.pytorch_utils import Conv1D

from . import experts
from .affine import affine_class
from .packed import is_quantized, pack, pack_on_meta, unpack, unpack_on_meta
from .sequence_head import heads_of

MAX_WEIGHTS = 1 << 31  # kernels of bitsandbytes count the weights of a tensor with 32 bits


def quantize_model(model: nn.Module, bits: str, dtype: torch.dtype, device: torch.device) -> None:
    """Quantize all linear layers except the head, and the experts.

    Args:
        model: The transformers model.
        bits: `4bit` or `8bit`; see `packed.pack`.
        dtype: Dtype of the computation.
        device: Device of the quantized weights. On the meta device, tensors have the right sizes.
    """
    for name in quantizable(model):
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        kind = affine_class(module, type(module))
        if kind is None:
            experts.pack_experts(module, last, bits, dtype, device)
        elif device.type == "meta":
            pack_on_meta(module, "weight", bits)
            module.__class__, module.dtype = QUANTIZED[kind], dtype
        else:
            module.weight, module.dtype = pack(module.weight, bits, device), dtype
            module.__class__ = QUANTIZED[kind]
            if module.bias is not None:
                module.bias.data = module.bias.data.to(device)


class _QuantizedLayer:
    """Mixin of layers that compute in `dtype` with a frozen weight, unpacked for each product.

    They replace the layers of bitsandbytes, which change their parameters: Linear4bit repacks its weight in eval mode
    on CPUs with AVX512-BF16, and both cast a trained bias. On CPUs, Linear8bitLt rounds its input to 8 bits, but only
    in eval mode.
    """

    dtype: torch.dtype
    handle: Tensor | None = None  # of `prepare_for_compiling`, int64 on the CPU, shape []

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and self.handle is not None:
            y = quantized_product(x.to(self.dtype), self.handle, _size_of_output(self), False)
        else:
            y = _QuantizedProduct.apply(x.to(self.dtype), self)
        return (y if self.bias is None else y + self.bias.to(y.dtype)).to(x.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the unpacked weight, shape [out, in]."""
        weight = dequantized(self) if "weight" in self._parameters else self._empty(dtype)
        return (weight.T if isinstance(self, Conv1D) else weight).to(dtype)

    def _empty(self, dtype: torch.dtype) -> Tensor:
        return unpack_on_meta(self, "weight", _stored_shape(self), dtype)


class QuantizedLinear(_QuantizedLayer, nn.Linear):
    """A quantized linear layer."""


class QuantizedConv1D(_QuantizedLayer, Conv1D):
    """A quantized layer of GPT-2, whose weight is [in, out]."""


QUANTIZED = {nn.Linear: QuantizedLinear, Conv1D: QuantizedConv1D}


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


_layers = weakref.WeakValueDictionary()  # handle -> layer


def prepare_for_compiling(block: nn.Module) -> None:
    """Give the quantized layers of a block handles, by which an operator in compiled code finds them.

    dynamo cannot trace packed weights. It makes one graph for all blocks, because handles are tensors.
    """
    for layer in block.modules():
        if isinstance(layer, _QuantizedLayer):
            layer.handle = torch.tensor(id(layer))
            _layers[id(layer)] = layer


@torch.library.custom_op("minitrain::quantized_product", mutates_args=())
def quantized_product(x: Tensor, handle: Tensor, size: int, transposed: bool) -> Tensor:
    """Return x W^T, or x W if `transposed`, for W of the quantized layer with this handle, shape [..., size]."""
    weight = _layers[int(handle)].dense(x.dtype)  # [out, in]
    return F.linear(x, weight.T if transposed else weight)


@quantized_product.register_fake
def _(x, handle, size, transposed):
    return x.new_empty(*x.shape[:-1], size)


def _save(ctx, inputs, output) -> None:
    x, handle, _, ctx.transposed = inputs
    ctx.save_for_backward(handle)
    ctx.size = x.shape[-1]


def _backward(ctx, grad: Tensor) -> tuple:
    return quantized_product(grad, *ctx.saved_tensors, ctx.size, not ctx.transposed), None, None, None


quantized_product.register_autograd(_backward, setup_context=_save)


def quantizable(model: nn.Module) -> list[str]:
    """Return the names of the weights to quantize: those of linear layers except the head, and experts.

    Weights that the module around a layer reads itself must stay as they are (Jamba's dt_proj).
    """
    excluded = {module for name in heads_of(model).trained for module in model.get_submodule(name).modules()}
    excluded.add(model.get_output_embeddings())
    modules = {name: module for name, module in model.named_modules() if module not in excluded}
    linear = [name for name, module in modules.items() if affine_class(module, type(module)) is not None]
    layers = [f"{name}.weight" for name in linear if not _is_read_by_parent(modules, name)]
    stacks = [name for name, shape in experts.find_experts(model).items() if shape.numel() < MAX_WEIGHTS]
    return [*layers, *stacks]


def _is_read_by_parent(modules: dict[str, nn.Module], name: str) -> bool:
    """Return whether the class of the module around a layer computes with the layer's weight."""
    path, _, last = name.rpartition(".")
    code = _source(type(modules.get(path)))
    return re.search(rf"\b{re.escape(last)}\.weight\b(?!\.(dtype|device|shape))", code) is not None


@functools.cache
def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # without a file
        return ""


def dequantize_model(model: nn.Module) -> None:
    """Replace quantized weights with ordinary ones in float32, with the rounded values."""
    for module in list(model.modules()):
        if isinstance(module, _QuantizedLayer):
            module.weight = nn.Parameter(dequantized(module).float())
            module.__class__ = next(layer for layer, quantized in QUANTIZED.items() if type(module) is quantized)
            del module.dtype
        elif experts.is_wrapped(module):
            experts.unpack_experts(module)


def dequantized(module: nn.Module) -> Tensor:
    """Return the weight of a layer as it is stored, unpacked if it is packed."""
    return unpack(module.weight, _stored_shape(module)) if is_quantized(module.weight) else module.weight


def _size_of_output(module: nn.Module) -> int:
    return module.nf if isinstance(module, Conv1D) else module.out_features


def _stored_shape(module: nn.Module) -> tuple[int, int]:
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.out_features, module.in_features)
