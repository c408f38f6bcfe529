"""Find out whether a layer computes x W^T + b, also if it is of a subclass of Linear."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

KINDS = (nn.Linear, Conv1D)


def affine_class(module: nn.Module, layer: type[nn.Module]) -> type[nn.Module] | None:
    """Return Linear, or the Conv1D of GPT-2, if a layer computes what that class does; else None.

    Args:
        module: The layer.
        layer: Its class.
    """
    for kind in KINDS:
        if layer is kind or (issubclass(layer, kind) and _is_affine(module, layer)):
            return kind
    return None


def _is_affine(module: nn.Module, layer: type[nn.Module]) -> bool:
    """Return whether the forward pass of a subclass of Linear computes x W^T + b, on a copy with a small weight.

    Others return the routing of experts (Llama 4, PhiMoE) or multiply groups of features (DeepSeek V4).
    """
    copied, size = copy.copy(module), 8
    weight = torch.linspace(-1, 1, size * size, device="cpu").view(size, size).sin()
    bias = None if module.bias is None else nn.Parameter(weight[0].exp())
    copied._parameters = {"weight": nn.Parameter(weight), "bias": bias}
    x = (torch.arange(2 * 3 * size, device="cpu").view(2, 3, size) * 0.7).cos()
    try:
        y = layer.forward(copied, x)
    except Exception:
        return False
    expected = F.linear(x, weight.T if issubclass(layer, Conv1D) else weight, bias)
    return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected, atol=1e-5)
