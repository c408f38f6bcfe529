"""A common interface to one device and to many, so that the training loop is the same."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from minitrain.config.schema import Config
from minitrain.errors import ConfigError

Read = Callable[[str, int, int], torch.Tensor]  # (parameter, first row, row after the last) -> rows


class SingleDevice:
    """One device, on which collectives do nothing."""

    rank = 0
    world_size = 1
    loads_shards = False  # whether the model is built without weights and each rank reads its own shards

    def __init__(self, device: torch.device):
        self.device = device

    def wrap(self, policy: nn.Module, blocks: nn.ModuleList, dtype: torch.dtype) -> nn.Module:
        """Return the policy on its device, sharded block by block if there are several."""
        return policy.to(self.device)

    def prefetch_blocks(self, blocks: nn.ModuleList) -> None:
        """Gather each block while the one before it computes. From then on, all blocks must run in their order."""

    def load_shards(self, policy: nn.Module, read: Read) -> None:
        """Load the parameters of a model that was built without weights."""
        assert not self.loads_shards

    def unsharded(self, policy: nn.Module) -> contextlib.AbstractContextManager:
        """Gather all parameters, so that parts of the policy can be called. All ranks must make the same calls."""
        return contextlib.nullcontext()

    def reshard(self, policy: nn.Module) -> None:
        """Drop gathered parameters. Call it after parameters were changed outside the optimizer."""

    def full_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the full tensor of a parameter. All ranks must call it for the same tensors, in the same order."""
        return tensor

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over ranks."""
        return values

    def max(self, value: float) -> float:
        """Return the maximum of a number over ranks."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order. Values must be JSON-serializable."""
        return [value]

    def gather_tensors(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors of all ranks, in rank order. Their first dimensions can differ."""
        return [values]

    def check_same(self, **values: Any) -> None:
        """Raise ConfigError on all ranks if a value differs from that of rank 0, which would lead to a deadlock."""

    def run_on_rank0(self, function: Callable[[], Any], meanwhile: Callable[[], None] | None = None) -> Any:
        """Call a function on rank 0 only. All ranks return its result, or raise its `MinitrainError`.

        Args:
            meanwhile: Called by the other ranks at once and by rank 0 after `function`, for the collectives in it.
        """
        try:
            return function()
        finally:
            if meanwhile is not None:
                meanwhile()

    def local_rank0_first(self) -> contextlib.AbstractContextManager:
        """Run the block first in one process of each machine, then in the others, which can use its files."""
        return contextlib.nullcontext()

    def backward_context(self, policy: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Return the context of a micro-batch's forward and backward pass. Only the last one must reduce gradients."""
        return contextlib.nullcontext()

    def grad_norm(self, parameters: list[nn.Parameter]) -> torch.Tensor:
        """Return the norm of the gradients, shape []."""
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def set_status(self, status: str) -> None:
        """Set what the run is doing, which is reported if it hangs."""

    def keep_alive(self, seconds: float = 0.0) -> None:
        """Report progress of this rank alone, without a collective.

        Args:
            seconds: A time in which it need not make progress, since it waits with a limit of its own.
        """

    def wait_for_ranks(self) -> None:
        """Wait until all ranks call it. Unlike in a collective, a rank may wait longer than the timeout."""

    def monitor_ranks(self) -> contextlib.AbstractContextManager:
        """Do as `naming_failures`, and end all ranks if one of them hangs."""
        return contextlib.nullcontext()

    def naming_failures(self) -> contextlib.AbstractContextManager:
        """End the other ranks with a RunError that names the first rank with an error."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """Release the process group, at the end of the run."""


def make_parallel(config: Config) -> SingleDevice:
    """Return the implementation that `trainer` selects. Raise ConfigError if the device does not exist."""
    device = pick_device(config.device)
    if config.trainer == "BasicTrainer":
        return SingleDevice(device)
    from .sharded import FullySharded

    return FullySharded(device, config.fsdp)


def pick_device(name: str) -> torch.device:
    """Return a device, where `auto` is the first GPU or else the CPU. Raise ConfigError if it does not exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: no CUDA device is available. Set device=auto or device=cpu.", "no-device")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device: no MPS device is available. Set device=auto or device=cpu.", "no-device")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: {str(error).splitlines()[0]}.", "not-a-choice") from None


def local_shard(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return this rank's rows of a tensor, sharing its memory, and the index of the first one."""
    if not is_sharded(tensor):
        return tensor, 0
    from torch.distributed.tensor import Shard

    rows, mesh = tensor.to_local(), tensor.device_mesh
    dimension = tensor.placements.index(Shard(0))
    per_rank = math.ceil(tensor.shape[0] / mesh.size(dimension))
    start = min(tensor.shape[0], per_rank * mesh.get_local_rank(dimension))
    assert len(rows) == min(tensor.shape[0], start + per_rank) - start
    return rows, start


def writes(tensor: torch.Tensor) -> bool:
    """Return whether this rank saves its rows: it is the first of the ranks that hold them."""
    if not is_sharded(tensor):
        return not dist.is_initialized() or dist.get_rank() == 0
    return tensor.device_mesh.ndim == 1 or tensor.device_mesh.get_local_rank(0) == 0


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether it is a DTensor, without importing that class, which takes half a second."""
    return hasattr(tensor, "device_mesh")
