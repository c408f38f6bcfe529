"""One device or many behind one small interface, so that the loop does not know which."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from minitrain.config.schema import Config
from minitrain.errors import ConfigError

Read = Callable[[str, int, int], torch.Tensor]  # (parameter, first row, row after the last) -> those rows


class SingleDevice:
    """Everything on one device: the collectives have nothing to do."""

    rank = 0
    world_size = 1
    loads_shards = False  # whether the model is built empty and each rank reads its own rows of the weights

    def __init__(self, device: torch.device):
        self.device = device

    def wrap(self, policy: nn.Module, blocks: nn.ModuleList, dtype: torch.dtype) -> nn.Module:
        """The policy as it is trained, on its device, sharded block by block where that applies."""
        return policy.to(self.device)

    def load_shards(self, policy: nn.Module, read: Read) -> None:
        """Gives the parameters of an empty model their values."""
        assert not self.loads_shards

    def unsharded(self, policy: nn.Module) -> contextlib.AbstractContextManager:
        """Inside, parts of the policy can be called by themselves, by all ranks alike."""
        return contextlib.nullcontext()

    def reshard(self, policy: nn.Module) -> None:
        """To be called after parameters were changed from outside, lest old gathered copies be used."""

    def full_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """The whole of a parameter; all ranks have to ask for the same ones in the same order."""
        return tensor

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over ranks."""
        return values

    def max(self, value: float) -> float:
        """The largest of a number over ranks; how ranks agree."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """What each rank has (anything that JSON can hold), in the order of ranks."""
        return [value]

    def check_same(self, **values: Any) -> None:
        """Raise ConfigError on all ranks when one has another value than rank 0: they would wait for one another."""

    def run_on_rank0(self, function: Callable[[], Any], meanwhile: Callable[[], None] | None = None) -> Any:
        """Calls a function on rank 0 only; what it returns, or the user's error it raises, reaches all ranks.

        `meanwhile` is called by every rank, by rank 0 after the function: for collectives that it takes part in.
        """
        try:
            return function()
        finally:
            if meanwhile is not None:
                meanwhile()

    def local_rank0_first(self) -> contextlib.AbstractContextManager:
        """Inside, the first process of a machine is alone; then come the others, who find what it left."""
        return contextlib.nullcontext()

    def backward_context(self, policy: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Around the backward pass of a micro-batch; gradients have to be reduced in the last one only."""
        return contextlib.nullcontext()

    def clip_grad_norm(self, parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
        """Global norm of the gradients before clipping -> []; scales them down to `max_norm` (0: leaves them)."""
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if max_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def set_status(self, place: str) -> None:
        """Where the run is, to be told should it hang."""

    def monitor_ranks(self) -> contextlib.AbstractContextManager:
        """As `naming_failures`, and a rank in which nothing moves ends all of them."""
        return contextlib.nullcontext()

    def naming_failures(self) -> contextlib.AbstractContextManager:
        """Inside, an error of one rank ends the others with a RunError that names it."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """To be called when all is done."""


def make_parallel(config: Config) -> SingleDevice:
    """What `trainer` names. Raises ConfigError for a device that is not there."""
    device = pick_device(config.device)
    if config.trainer == "BasicTrainer":
        return SingleDevice(device)
    from .sharded import FullySharded

    return FullySharded(device, config.fsdp)


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU, else the CPU. Raises ConfigError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: there is no CUDA device here; use device=auto or device=cpu", "no-device")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device: there is no MPS device here; use device=auto or device=cpu", "no-device")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: {str(error).splitlines()[0]}", "not-a-choice") from None


def local_shard(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's rows of a tensor, sharing its memory, and the number of the first one."""
    if not _is_sharded(tensor):
        return tensor, 0
    from torch.distributed.tensor import Shard

    rows, mesh = tensor.to_local(), tensor.device_mesh
    dimension = tensor.placements.index(Shard(0))
    per_rank = math.ceil(tensor.shape[0] / mesh.size(dimension))
    start = min(tensor.shape[0], per_rank * mesh.get_local_rank(dimension))
    assert len(rows) == min(tensor.shape[0], start + per_rank) - start
    return rows, start


def writes(tensor: torch.Tensor) -> bool:
    """Whether it is for this rank to save its rows: they are nobody else's, or it is the first that has them."""
    if not _is_sharded(tensor):
        return not dist.is_initialized() or dist.get_rank() == 0
    return tensor.device_mesh.ndim == 1 or tensor.device_mesh.get_local_rank(0) == 0


def _is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor, without the half second that its import takes where nothing is sharded."""
    return hasattr(tensor, "device_mesh")
