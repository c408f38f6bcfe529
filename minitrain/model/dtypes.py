"""Which dtype each tensor of a model has, in memory and in its files."""

import re

import torch
from torch import Tensor, nn


class DtypePlan:
    """The dtypes of a model's tensors if its weights are in `dtype`.

    Buffers keep theirs, because bfloat16 is too coarse for rotary frequencies and for the biases of a router. So do the
    parameters that transformers keeps in float32 (`_keep_in_fp32_modules_strict`; in float16 also
    `_keep_in_fp32_modules`), as it loads them again.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.dtype = dtype
        self.buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
        patterns = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
        patterns = [pattern.replace("*", ".*") for pattern in patterns]
        self.kept = re.compile("|".join(patterns)) if patterns else None

    def __call__(self, name: str, tensor: Tensor) -> torch.dtype:
        """Return the dtype of a tensor of the state dict."""
        if not tensor.is_floating_point() or name in self.buffers:
            return tensor.dtype
        return torch.float32 if self.kept is not None and self.kept.search(name) else self.dtype
