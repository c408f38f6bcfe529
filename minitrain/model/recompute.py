"""Recompute activations in the backward pass instead of keeping them: `checkpoint_activations`."""

import logging
from collections import defaultdict, deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import (
    CheckpointPolicy,
    _detach_helper,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from . import experts, lora
from .decoder import find_blocks

# Results that `selective` keeps: they take longer to compute than others of their size. Batched products do not count,
# because they are the scores of eager attention, whose size is quadratic in the length.
KEPT_OPERATIONS = {
    "aten::mm",
    "aten::addmm",
    "aten::_grouped_mm",
    "aten::_scaled_mm",
    "aten::_scaled_grouped_mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
}
KEPT_NAMESPACES = {"minitrain", "torch_attn", "flash_attn", "flash_attn_2", "flash_attn_3"}  # of attention operators


def checkpoint_activations(model: nn.Module, mode: str | int = "full") -> list[nn.Module]:
    """Recompute activations of blocks in the backward pass (non-reentrant), and return these blocks.

    Args:
        model: The model.
        mode: full: keep only the input of each block. selective: keep the results of matrix products and attention,
            too. n: keep only the input of every n-th block, and everything in the others.
    """
    if mode == "selective":  # torch warns of operations in place, which are not part of what is kept
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    blocks = list(find_blocks(model))[:: mode if isinstance(mode, int) else 1]
    for block in blocks:
        experts.mark_recomputed(block)
        if mode == "selective":
            lora.keep_products(block)
        block.forward = _recomputed(block, mode == "selective")
    return blocks


def _recomputed(block: nn.Module, is_selective: bool):
    """Return the forward function of a block that is recomputed.

    Most blocks draw no random numbers. Then the state of the generators is neither saved nor restored, which would take
    time in each call. The first call finds out.
    """
    forward, is_random = block.forward, {}  # block.training -> whether it draws random numbers

    def recomputed(*args, **kwargs):
        if torch.compiler.is_compiling():  # the compiler saves no state without need
            if is_selective:
                return checkpoint(forward, *args, use_reentrant=False, context_fn=_compiled_products, **kwargs)
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        knows = block.training in is_random or not torch.is_grad_enabled()
        before = None if knows else _random_state()
        output = checkpoint(
            forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=is_random.get(block.training, True),
            context_fn=_keep_products if is_selective else noop_context_fn,
            **kwargs,
        )
        if not knows:
            is_random[block.training] = _random_state() != before
        return output

    return recomputed


def _random_state() -> list[bytes]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return [state.numpy().tobytes() for state in states]


# -------------------------------------------------------------------------------------------------------- selective


def _is_kept(operation, args: tuple) -> bool:
    name = operation.name().partition(".")[0]
    if name == "aten::addmm" and args[0].ndim == 2:  # the update of LoRA, which is added to a kept product
        return False
    return name in KEPT_OPERATIONS or operation.namespace in KEPT_NAMESPACES


def _compiled_products() -> tuple:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context, operation, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_kept(operation, args) else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_products() -> tuple:
    results = defaultdict(deque)
    return _Keep(results), _Reuse(results)


class _Keep(TorchDispatchMode):
    """Keeps the results of products and attention.

    torch's own modes raise an error when the model changes a result in place, or when an operation runs only in the
    second pass, such as the cast of a shared weight, which autocast caches in the first pass.
    """

    def __init__(self, results: dict[Any, deque]):
        super().__init__()
        self.results = results

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if _is_kept(operation, args):
            kept = tree_map_only(Tensor, _detach_helper, result)  # shares the version, but not the graph
            self.results[operation].append((kept, _versions(kept)))
        return result


class _Reuse(TorchDispatchMode):
    """Returns the kept results instead of computing them again, except those that were changed in place."""

    def __init__(self, results: dict[Any, deque]):
        super().__init__()
        self.results = results

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if self.results[operation] and _is_kept(operation, args):
            kept, versions = self.results[operation].popleft()
            if _versions(kept) == versions:
                return kept
        return operation(*args, **(kwargs or {}))


def _versions(result) -> list[int]:
    return [tensor._version for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
