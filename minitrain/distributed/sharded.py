"""Many devices: FSDP2 with the interface of `SingleDevice`. Imported only for FSDPTrainer."""

import atexit
import contextlib
import dataclasses
import itertools
import json
import os
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from minitrain import errors
from minitrain.config.sections import FSDPConfig
from minitrain.errors import ConfigError, MinitrainError, RunError, is_failure
from minitrain.io.redact import redact

from .parallel import Read, SingleDevice, local_shard
from .process import let_threads_settle
from .watchdog import Watchdog

_turns = itertools.count()
FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.1  # seconds between two looks at whether all ranks have come
FAILURE = "failure"  # store key of the message of the first rank that fails


class LostContactError(RunError):
    """The connection to another process is lost."""


class FullySharded(SingleDevice):
    """FSDP2: each block's parameters are sharded along their first dimension, and gathered for its computation.

    Shards have the dtype of the parameters (float32 by default), gradients are reduced in float32, and blocks compute
    in policy_dtype. Gradients are summed, not averaged, because the loop divides by the number of items of the step.
    """

    loads_shards = True

    def __init__(self, device: torch.device, options: FSDPConfig):
        self.options = options
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        super().__init__(device)
        _join(device, timedelta(seconds=options.timeout_seconds + 60))
        self.set_layout()
        if self.world_size > 1:
            self.store = _own_store()
            self.waiting = dist.new_group(backend="gloo", timeout=timedelta(days=7))
            self.watchdog = Watchdog(self.rank, self.world_size, _own_store(), options.timeout_seconds)

    def set_layout(self) -> None:
        """Set rank, world size and device mesh from the process group."""
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        shape = _mesh_shape(self.options.shard, self.world_size)
        self.mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
        self.replicas = self.mesh.size(0) if self.mesh.ndim == 2 else 1
        self.store = self.watchdog = None
        self.kept_gathered: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # from the forward to the backward pass

    def wrap(self, policy: nn.Module, blocks: nn.ModuleList, dtype: torch.dtype) -> nn.Module:
        # No cast of inputs: with autocast the residual stream stays float32, as on one device.
        rest = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        compute = rest if dtype == torch.float32 else dataclasses.replace(rest, param_dtype=dtype)
        offload = CPUOffloadPolicy() if self.options.cpu_offload else OffloadPolicy()
        # The backward pass begins with the LM head and the last block.
        self.kept_gathered.update([policy, *(blocks if self.options.shard == "grad" else blocks[-1:])])
        for block in blocks:
            reshard = block not in self.kept_gathered
            fully_shard(block, mesh=self.mesh, mp_policy=compute, offload_policy=offload, reshard_after_forward=reshard)
        fully_shard(policy, mesh=self.mesh, mp_policy=rest, offload_policy=offload, reshard_after_forward=False)
        register_fsdp_forward_method(policy, "target_hidden_states")  # gathers embeddings and head, as forward does
        for module in _sharded_modules(policy):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        policy.max_over_ranks = self.max
        return policy

    def prefetch_blocks(self, blocks: nn.ModuleList) -> None:
        for block, following in itertools.pairwise(blocks):
            block.set_modules_to_forward_prefetch([following])

    def load_shards(self, policy: nn.Module, read: Read) -> None:
        buffers = {name: buffer.clone() for name, buffer in policy.named_buffers()}
        device = torch.device("cpu") if self.options.cpu_offload else self.device
        held = list(policy.parameters())  # so that their ids stay unique
        mapped = self._mapped(policy, read) if self.device.type == "cpu" else {}
        policy._apply(lambda t: mapped[id(t)][1] if id(t) in mapped else torch.empty_like(t, device=device))
        del held
        with torch.no_grad():
            for name, buffer in policy.named_buffers():
                buffer.copy_(buffers[name])
            names = {name for name, _ in mapped.values()}
            for name, parameter in policy.named_parameters():
                rows, start = local_shard(parameter)
                if name not in names and rows.numel():
                    rows.copy_(read(name, start, start + len(rows)))

    def _mapped(self, policy: nn.Module, read: Read) -> dict[int, tuple[str, torch.Tensor]]:
        """Return name and value of frozen parameters, by the id of those on the meta device, without copying them.

        The values are pages of the model's files, which all processes of a machine share. The mapping is private, so
        nothing is ever written to the files.
        """
        mapped = {}
        for name, parameter in policy.named_parameters():
            rows, start = local_shard(parameter)
            if parameter.requires_grad or not rows.numel():
                continue
            value = read(name, start, start + len(rows))
            if value.dtype == rows.dtype and value.is_contiguous():
                layout = parameter.device_mesh, parameter.placements
                shape = {"shape": parameter.shape, "stride": parameter.stride()}
                mapped[id(parameter)] = name, DTensor.from_local(value, *layout, run_check=False, **shape)
        return mapped

    @contextlib.contextmanager
    def unsharded(self, policy: nn.Module) -> Iterator[None]:
        # Each module is gathered once, and kept: a model that generates runs its blocks for every token.
        for module in _sharded_modules(policy):
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in _sharded_modules(policy):
                module.set_reshard_after_forward(module not in self.kept_gathered, recurse=False)
            self.reshard(policy)

    def reshard(self, policy: nn.Module) -> None:
        for module in _sharded_modules(policy):
            module.reshard()

    def full_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        self._beat()
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self._beat()
        values = values.clone()
        dist.all_reduce(values)
        return values

    def max(self, value: float) -> float:
        self._beat()
        largest = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.item()

    def gather(self, value: Any) -> list[Any]:
        encoded = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        return [json.loads(one.numpy().tobytes()) for one in self.gather_tensors(encoded)]

    def gather_tensors(self, values: torch.Tensor) -> list[torch.Tensor]:
        lengths = torch.zeros(self.world_size, dtype=torch.int64)  # [ranks]
        lengths[self.rank] = len(values)
        lengths = self.sum(lengths)
        padded = values.new_zeros(max(1, int(lengths.max())), *values.shape[1:])
        padded[: len(values)] = values
        gathered = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(gathered, padded)
        return [one[:n] for one, n in zip(gathered, lengths.tolist(), strict=True)]

    def check_same(self, **values: Any) -> None:
        ranks = self.gather(values)
        for rank, others in enumerate(ranks):
            if differing := [name for name, value in ranks[0].items() if others[name] != value]:
                raise ConfigError(
                    f"{', '.join(differing)}: the value of rank {rank} differs from that of rank 0. "
                    "Start all ranks with the same config, data and model.",
                    "mismatch",
                )

    def run_on_rank0(self, function: Callable[[], Any], meanwhile: Callable[[], None] | None = None) -> Any:
        value, error = None, None
        if self.rank == 0:
            try:
                value = function()
            except MinitrainError as raised:
                error = [type(raised).__name__, raised.message, raised.code]
        if meanwhile is not None:
            meanwhile()
        self.wait_for_ranks()  # the function can take longer than the timeout
        value, error = self.gather([value, error])[0]
        if error is not None:
            raise getattr(errors, error[0])(*error[1:])
        return value

    @contextlib.contextmanager
    def local_rank0_first(self) -> Iterator[None]:
        # Through the store, because a wait there may take hours.
        key = f"turn/{os.environ.get('GROUP_RANK', '0')}/{next(_turns)}"
        is_first = int(os.environ.get("LOCAL_RANK", "0")) == 0
        if self.store is not None and not is_first:
            with _reporting_lost_contact():
                self.store.wait([key])
            if failure := self._failure():
                raise RunError(failure, "process-failed")
        try:
            with self.naming_failures():
                yield
        finally:
            if self.store is not None and is_first:
                self.store.set(key, "done")

    def backward_context(self, policy: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        # With sharded gradients, accumulating unsharded ones would cost the memory that sharding saves.
        self._beat()
        if self.options.shard == "none":
            policy.set_requires_gradient_sync(last)
        elif self.options.shard == "hybrid":
            policy.set_requires_all_reduce(last)
        # The backward pass ends where the next forward pass begins, so keeping these gathered takes no more memory.
        modules = _sharded_modules(policy)
        for module in modules if self.options.shard == "grad" else modules[:2]:
            module.set_reshard_after_backward(last, recurse=False)
        return contextlib.nullcontext()

    def grad_norm(self, parameters: list[nn.Parameter]) -> torch.Tensor:
        grads = [local_shard(p.grad)[0] for p in parameters if p.grad is not None]
        squares = torch.stack(torch._foreach_norm(grads)).double().square().sum()  # []
        return (self.sum(squares) / self.replicas).sqrt().float()  # []

    def set_status(self, status: str) -> None:
        if self.watchdog is not None:
            self.watchdog.status = status

    def keep_alive(self, seconds: float = 0.0) -> None:
        if self.watchdog is not None:
            self.watchdog.keep_alive(seconds)

    def wait_for_ranks(self) -> None:
        if self.store is None:
            return
        self._beat()
        pause = FIRST_PAUSE
        with _reporting_lost_contact():
            others = dist.barrier(self.waiting, async_op=True)
            while not others.is_completed():
                self.keep_alive()  # a rank that hangs is ended by its own watchdog
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            others.wait()

    @contextlib.contextmanager
    def monitor_ranks(self) -> Iterator[None]:
        if self.watchdog is not None:
            self.watchdog.start()
        try:
            with self.naming_failures():
                yield
        finally:
            if self.watchdog is not None:
                self.watchdog.stop()

    @contextlib.contextmanager
    def naming_failures(self) -> Iterator[None]:
        try:
            with _reporting_lost_contact():
                yield
        except LostContactError:
            if failure := self._failure():
                raise RunError(failure, "process-failed") from None
            raise
        except BaseException as error:
            if self.store is not None and is_failure(error):
                is_known = isinstance(error, MinitrainError)
                text = error.message if is_known else f"{type(error).__name__}: {str(error).strip() or 'no message'}"
                with contextlib.suppress(RuntimeError):  # the store is gone
                    self.store.compare_set(FAILURE, "", redact(f"rank {self.rank} failed: {text.splitlines()[0]}"))
            raise

    def _failure(self) -> str | None:
        """Return the message of the first rank that failed, if there is one."""
        with contextlib.suppress(RuntimeError):  # the store is gone
            if self.store is not None and self.store.check([FAILURE]):
                return self.store.get(FAILURE).decode()
        return None

    def close(self) -> None:
        with _reporting_lost_contact():
            self.max(0)  # a barrier: a rank that exits early would close connections of the others' last collective
        self.store = self.watchdog = None  # connections must be closed before interpreter shutdown
        dist.destroy_process_group()

    def _beat(self) -> None:
        if self.watchdog is not None:
            self.watchdog.beat()


def _join(device: torch.device, timeout: timedelta) -> None:
    """Initialize the process group; without a launcher, with this process alone."""
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        # When torchrun restarts the processes, its store still has the addresses of the old ones.
        store = dist.PrefixStore(f"attempt/{_attempt()}", store)
    else:
        store, rank, world_size = dist.HashStore(), 0, 1
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    if world_size > 1:
        atexit.register(let_threads_settle)


@contextlib.contextmanager
def _reporting_lost_contact() -> Iterator[None]:
    """Raise LostContactError if the connection to another process is lost."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "by peer")):
            text = str(error).strip().splitlines()[0]
            message = f"lost contact with another process ({text}). See the message of that process."
            raise LostContactError(message, "process-failed") from None
        raise


def _attempt() -> str:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _own_store() -> dist.Store:
    """Return a new connection to the launcher's store, because a connection serves one caller at a time."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(days=1))
    return dist.PrefixStore(f"minitrain/{_attempt()}", store)


def _mesh_shape(shard: str, world_size: int) -> tuple[int, ...]:
    """Return the shape of the device mesh: (ranks,) or (replicas, ranks per replica)."""
    if shard == "none":
        return (world_size, 1)
    if shard == "hybrid":
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return (world_size // local, local)
    return (world_size,)


def _sharded_modules(policy: nn.Module) -> list[FSDPModule]:
    return [module for module in policy.modules() if isinstance(module, FSDPModule)]
