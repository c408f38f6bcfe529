"""One device or many behind one small interface, so that the loop does not know which."""

import contextlib

import torch
from torch import nn

from ..errors import ConfigError


class SingleDevice:
    """Everything on one device: the collectives have nothing to do."""

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device):
        self.device = device

    def wrap(self, policy: nn.Module) -> nn.Module:
        """The policy as it is trained, sharded where that applies."""
        return policy

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over ranks."""
        return values

    def max(self, flag: int) -> int:
        """The largest of a number over ranks; how ranks agree."""
        return flag

    def backward_context(self, last: bool) -> contextlib.AbstractContextManager:
        """Around the backward pass of a micro-batch; gradients have to be reduced in the last one only."""
        return contextlib.nullcontext()

    def clip_grad_norm(self, parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
        """Global norm of the gradients before clipping -> []; scales them down to `max_norm` (0: leaves them)."""
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if max_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def barrier(self) -> None:
        """Waits for all ranks."""


PARALLEL = {"BasicTrainer": SingleDevice}


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU, else the CPU. Raises ConfigError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: there is no CUDA device here; use device=auto or device=cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device: there is no MPS device here; use device=auto or device=cpu")
    return torch.device(name)
