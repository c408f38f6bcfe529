"""The state of an optimizer as tensors of a checkpoint, `parameter/state name`, and numbers.

Quantized states are tensor subclasses, of which each inner tensor is one entry: `parameter/exp_avg.codes`. The state
that belongs to a rank's rows of a parameter has the rank in its name, `parameter/state1@0`, and cannot be resharded.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from minitrain.distributed.parallel import is_sharded

from .optimizers import InBackward, MasterWeights, StandIns

OF_RANK = "@"
Parameters = Mapping[str, nn.Parameter]


def named_state(
    parameters: Parameters, optimizer: torch.optim.Optimizer, rank: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of an optimizer's state, without those that several parameters share, and its numbers."""
    tensors, numbers = {}, {}
    for name, owner, suffix in _owners(parameters, optimizer, rank):
        for key, value in optimizer.state.get(owner, {}).items():
            if isinstance(value, Tensor):
                tensors |= {f"{name}/{inner}{suffix}": leaf for inner, leaf in _leaves(key, value)}
            else:
                numbers[f"{name}/{key}"] = value
        if _is_master(owner, parameters[name], optimizer):
            tensors[f"{name}/master"] = owner.detach()
    uses = Counter(_address(tensor) for tensor in tensors.values())
    # A tensor of several parameters, such as bitsandbytes' table of values, is a constant that the first step makes.
    return {name: each for name, each in tensors.items() if uses[_address(each)] == 1 or not each.numel()}, numbers


def load_state(
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    rank: int,
    numbers: Mapping[str, Any],
    read: Callable[[str, Tensor], bool],
) -> None:
    """Load a state into the tensors that a step of the optimizer makes, which have the right type and device.

    Args:
        parameters: The trained parameters by name. They are changed.
        numbers: The numbers of the state.
        read: Reads a tensor by its name, and returns whether it was saved.
    """
    _make_state(parameters, optimizer)
    for name, owner, suffix in _owners(parameters, optimizer, rank):
        found, state = False, optimizer.state.get(owner, {})
        for key, value in state.items():
            if isinstance(value, Tensor):
                for inner, leaf in _leaves(key, value):
                    found |= read(f"{name}/{inner}{suffix}", leaf)
            elif f"{name}/{key}" in numbers:
                found, state[key] = True, numbers[f"{name}/{key}"]
        if _is_master(owner, parameters[name], optimizer):
            read(f"{name}/master", owner.detach())
        if not found:  # it had no gradient yet
            optimizer.state.pop(owner, None)


def _make_state(parameters: Parameters, optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer make its state, by a step on gradients of 0. In the backward pass, one exists at a time."""
    groups = [dict(group) for group in optimizer.param_groups]
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
        if isinstance(optimizer, InBackward):
            optimizer.update(parameter)
    optimizer.step()
    for parameter in parameters.values():
        parameter.grad = None
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        group.update(before)


def _owners(
    parameters: Parameters, optimizer: torch.optim.Optimizer, rank: int
) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Yield (name of a parameter, the tensor that has its state, end of the names of the state's tensors)."""
    stand_ins = _inner(optimizer).stand_ins if isinstance(_inner(optimizer), StandIns) else {}
    for name, parameter in parameters.items():
        owner = stand_ins.get(parameter, parameter)
        yield name, owner, f"{OF_RANK}{rank}" if is_sharded(parameter) and not is_sharded(owner) else ""


def _inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return optimizer.optimizer if isinstance(optimizer, InBackward) else optimizer


def _is_master(owner: nn.Parameter, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(_inner(optimizer), MasterWeights) and owner is not parameter


def _leaves(key: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor, or the named inner tensors of a quantized one."""
    if is_sharded(value) or not is_traceable_wrapper_subclass(value):
        yield key, value
        return
    for name in value.__tensor_flatten__()[0]:
        yield from _leaves(f"{key}.{name}", getattr(value, name))


def _address(tensor: Tensor) -> tuple[int, int]:
    """Return what tensors of the same memory have in common, also if they are fake."""
    if is_sharded(tensor):
        return id(tensor), 0
    return tensor.untyped_storage()._cdata, tensor.storage_offset()
