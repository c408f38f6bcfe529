"""Many devices: FSDP2 behind the interface of `SingleDevice`. It is imported by FSDPTrainer only."""

import atexit
import contextlib
import dataclasses
import itertools
import json
import os
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
from minitrain.config.schema import FSDPConfig
from minitrain.errors import ConfigError, MinitrainError, RunError, is_failure
from minitrain.io.redact import redact

from .parallel import Read, SingleDevice, local_shard
from .process import let_threads_settle
from .watchdog import Watchdog

_turns = itertools.count()
FAILURE = "failure"  # the key in the store under which the first rank that fails says why


class LostContactError(RunError):
    """Another process is gone."""


class FullySharded(SingleDevice):
    """FSDP2: every block's parameters cut along their first dimension over the ranks, gathered when it computes.

    Shards and the reduction of gradients are in the parameters' own dtype (float32) and float32, the compute of the
    blocks in policy_dtype. Gradients are summed, not averaged: the loop has divided by the weight of the whole step.
    """

    loads_shards = True

    def __init__(self, device: torch.device, options: FSDPConfig):
        self.options = options
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        super().__init__(device)
        _join(device, timedelta(seconds=options.timeout_seconds + 60))
        self.lay_out()
        if self.world_size > 1:
            self.store = _own_store()
            self.watchdog = Watchdog(self.rank, self.world_size, _own_store(), options.timeout_seconds)

    def lay_out(self) -> None:
        """Finds this rank's place among those of the process group."""
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        shape = _mesh_shape(self.options.shard, self.world_size)
        self.mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
        self.replicas = self.mesh.size(0) if self.mesh.ndim == 2 else 1
        self.store = self.watchdog = None

    def wrap(self, policy: nn.Module, blocks: nn.ModuleList, dtype: torch.dtype) -> nn.Module:
        # Inside autocast, inputs keep their float32, so that the residual stream does as it does on one device.
        rest = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        compute = rest if dtype == torch.float32 else dataclasses.replace(rest, param_dtype=dtype)
        offload = CPUOffloadPolicy() if self.options.cpu_offload else OffloadPolicy()
        keep = self.options.shard == "grad"
        for block in blocks:
            fully_shard(
                block, mesh=self.mesh, mp_policy=compute, offload_policy=offload, reshard_after_forward=not keep
            )
        fully_shard(policy, mesh=self.mesh, mp_policy=rest, offload_policy=offload)
        register_fsdp_forward_method(policy, "target_hidden_states")  # gathers embeddings and head as forward does
        for module in _sharded_modules(policy):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        return policy

    def load_shards(self, policy: nn.Module, read: Read) -> None:
        buffers = {name: buffer.clone() for name, buffer in policy.named_buffers()}
        policy.to_empty(device="cpu" if self.options.cpu_offload else self.device)
        with torch.no_grad():
            for name, buffer in policy.named_buffers():
                buffer.copy_(buffers[name])
            for name, parameter in policy.named_parameters():
                rows, start = local_shard(parameter)
                if rows.numel():
                    rows.copy_(read(name, start, start + len(rows)))

    @contextlib.contextmanager
    def unsharded(self, policy: nn.Module) -> Iterator[None]:
        policy.unshard()
        try:
            yield
        finally:
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
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        padded = torch.zeros(int(self.max(len(text))), dtype=torch.uint8)
        padded[: len(text)] = text
        found = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(found, padded)
        return [json.loads(bytes(row.tolist()).rstrip(b"\0")) for row in found]

    def check_same(self, **values: Any) -> None:
        found = self.gather(values)
        for rank, theirs in enumerate(found):
            if differing := [name for name, value in found[0].items() if theirs[name] != value]:
                raise ConfigError(
                    f"{', '.join(differing)}: rank {rank} has another value than rank 0. Start all ranks with the same "
                    "config, data and model.",
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
        value, error = self.gather([value, error])[0]
        if error is not None:
            raise getattr(errors, error[0])(*error[1:])
        return value

    @contextlib.contextmanager
    def local_rank0_first(self) -> Iterator[None]:
        # By the store, where one may wait for hours.
        key = f"turn/{os.environ.get('GROUP_RANK', '0')}/{next(_turns)}"
        alone = int(os.environ.get("LOCAL_RANK", "0")) == 0
        if self.store is not None and not alone:
            with _loss_told():
                self.store.wait([key])
            if failure := self._failure():
                raise RunError(failure, "process-failed")
        try:
            with self.naming_failures():
                yield
        finally:
            if self.store is not None and alone:
                self.store.set(key, "done")

    def backward_context(self, policy: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        # Where gradients are cut up, to keep them whole until the last micro-batch would cost what cutting saves.
        self._beat()
        if self.options.shard == "none":
            policy.set_requires_gradient_sync(last)
        elif self.options.shard == "hybrid":
            policy.set_requires_all_reduce(last)
        return contextlib.nullcontext()

    def clip_grad_norm(self, parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
        grads = [local_shard(p.grad)[0] for p in parameters if p.grad is not None]
        squares = sum(norm.double() ** 2 for norm in torch._foreach_norm(grads))  # []
        norm = (self.sum(squares) / self.replicas).sqrt().float()  # []
        if max_norm > 0:
            torch._foreach_mul_(grads, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm

    def set_status(self, place: str) -> None:
        if self.watchdog is not None:
            self.watchdog.place = place

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
            with _loss_told():
                yield
        except LostContactError:
            if failure := self._failure():
                raise RunError(failure, "process-failed") from None
            raise
        except BaseException as error:
            if self.store is not None and is_failure(error):
                known = isinstance(error, MinitrainError)
                text = error.message if known else f"{type(error).__name__}: {str(error).strip() or 'no message'}"
                with contextlib.suppress(RuntimeError):  # the store is gone
                    self.store.compare_set(FAILURE, "", redact(f"rank {self.rank} failed: {text.splitlines()[0]}"))
            raise

    def _failure(self) -> str | None:
        """Return which rank failed first and why, if one has said so."""
        with contextlib.suppress(RuntimeError):  # the store is gone
            if self.store is not None and self.store.check([FAILURE]):
                return self.store.get(FAILURE).decode()
        return None

    def close(self) -> None:
        with _loss_told():
            self.max(0)  # a barrier: one that leaves early would take the connections of another's last collective
        self.store = self.watchdog = None  # connections have to end before the interpreter does
        dist.destroy_process_group()

    def _beat(self) -> None:
        if self.watchdog is not None:
            self.watchdog.beat()


def _join(device: torch.device, timeout: timedelta) -> None:
    """Makes the process group; without a launcher, of this process alone."""
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun keeps its store when it starts the processes anew, with the addresses of the dead ones in it.
        store = dist.PrefixStore(f"attempt/{_attempt()}", store)
    else:
        store, rank, world_size = dist.HashStore(), 0, 1
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    if world_size > 1:
        atexit.register(let_threads_settle)


@contextlib.contextmanager
def _loss_told() -> Iterator[None]:
    """Inside, the loss of another process is a LostContactError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "by peer")):
            text = str(error).strip().splitlines()[0]
            told = f"lost contact with another process; see what that one said ({text})"
            raise LostContactError(told, "process-failed") from None
        raise


def _attempt() -> str:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _own_store() -> dist.Store:
    """A connection of its own to the launcher's store, since a connection serves one caller at a time."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(days=1))
    return dist.PrefixStore(f"minitrain/{_attempt()}", store)


def _mesh_shape(shard: str, world_size: int) -> tuple[int, ...]:
    """(ranks,), or (replicas, ranks that share one)."""
    if shard == "none":
        return (world_size, 1)
    if shard == "hybrid":
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return (world_size // local, local)
    return (world_size,)


def _sharded_modules(policy: nn.Module) -> list[FSDPModule]:
    return [module for module in policy.modules() if isinstance(module, FSDPModule)]
