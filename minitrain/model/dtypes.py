"""Which dtype each tensor of a model has, in memory and in its files."""

import copy
import re

import torch
from torch import Tensor, nn


class DtypePlan:
    """The dtypes of a model's tensors if its weights are in `dtype`.

    Buffers keep theirs, because bfloat16 is too coarse for rotary frequencies and for the biases of a router. The
    parameters that transformers keeps in float32 when it loads a model in `dtype` are in float32: those of
    `_keep_in_fp32_modules_strict` (in float16 also `_keep_in_fp32_modules`), and those that the class makes in float32.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.dtype = dtype
        self.buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
        patterns = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
        patterns = [pattern.replace("*", ".*") for pattern in patterns]
        self.kept = re.compile("|".join(patterns)) if patterns else None
        self.made_in_float32 = _made_in_float32(model, dtype)

    def __call__(self, name: str, tensor: Tensor) -> torch.dtype:
        """Return the dtype of a tensor of the state dict."""
        if not tensor.is_floating_point() or name in self.buffers:
            return tensor.dtype
        is_kept = name in self.made_in_float32 or (self.kept is not None and self.kept.search(name))
        return torch.float32 if is_kept else self.dtype


def _made_in_float32(model: nn.Module, dtype: torch.dtype) -> set[str]:
    """Return the parameters that the model's class makes in float32 whatever the default dtype is."""
    if dtype == torch.float32 or not hasattr(model, "_get_dtype_plan"):
        return set()
    default, config = torch.get_default_dtype(), copy.deepcopy(model.config)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if part is not None:
            part.dtype = dtype  # a multimodal class makes its parts in the dtype of their configs
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            empty = type(model)(config)
    finally:
        torch.set_default_dtype(default)
    named = empty.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if parameter.dtype == torch.float32}
