"""How much memory a training takes at its worst and what takes it, before it starts and without weights.

A step of it is taken with tensors that have shapes and no memory (PyTorch's fake tensors), by the very code that
trains: policy, loss, optimizer, sharding. A ledger notes each tensor that is made and forgotten on the way. Only
integers, which say where documents lie, are real. So nothing here knows what some layer keeps, and what is new counts.
"""

import contextlib
import dataclasses
import functools
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from minitrain.batch import Batch
from minitrain.config.schema import Config, FSDPConfig
from minitrain.data.loader import MicrobatchLoader
from minitrain.distributed.checks import uneven_batch
from minitrain.distributed.parallel import SingleDevice, local_shard
from minitrain.distributed.sharded import FullySharded
from minitrain.errors import ConfigError
from minitrain.losses import Loss, Models
from minitrain.model import kd_divergence, logprobs
from minitrain.model.load import CPU, DTYPES, META, build_frozen
from minitrain.training.aux_models import REF_LOGPS, PrecomputedRefLogps, build_aux_models, reference_kind
from minitrain.training.optim import build_optimizer
from minitrain.training.setup import Preparation, make_loader, prepare_policy
from minitrain.training.step import Precision, forward_backward, inference, optim_step

PARTS = ("weights", "reference", "teacher", "gradients", "optimizer", "activations", "head", "gathered")
HEAD = {logprobs.__name__, kd_divergence.__name__}  # whose backward passes are the output layer's
OFFLOADED = frozenset({"weights", "gradients", "optimizer"})  # by fsdp.cpu_offload
aten = torch.ops.aten
FACTORIES = {aten.empty.memory_format, aten.empty_strided.default}
FROM_INPUTS = {aten._local_scalar_dense.default: 0, aten.allclose.default: True}  # what is read off a fake tensor


class MemoryTracker(TorchDispatchMode):
    """Notes inside it how many bytes each part of a training holds: now, at most, and of all parts together at most.

    A tensor belongs to the part that was at work when it was made, unless `hold` says otherwise; views of it count
    once. Parts `elsewhere` do not count towards the peak. Of real tensors and of fake ones alike; what an operation
    takes for itself and gives back is not seen.
    """

    def __init__(self, fake: FakeTensorMode | None = None, elsewhere: frozenset[str] = frozenset()):
        super().__init__()
        self.fake, self.elsewhere = fake, elsewhere
        self.part = "activations"  # at work
        self.now, self.most, self.total, self.peak = Counter(), Counter(), 0, 0
        self.held: dict[int, tuple[str, int, weakref.ref]] = {}  # storage -> part, bytes, itself

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does to its rows comes here again
        kwargs = kwargs or {}
        if active_fake_mode() not in (None, self.fake):  # DTensor tries something out
            return function(*args, **kwargs)
        made = self._call(function, args, kwargs)
        part = "head" if _in_head() else self.part
        if self._makes_floats(function, kwargs):
            part = "gathered"
        given = {_key(tensor) for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor) and _key(tensor) not in given | self.held.keys():
                self.hold(tensor, part)
        return made

    def _call(self, function, args: tuple, kwargs: dict) -> Any:
        if not any(isinstance(value, FakeTensor) for value in tree_iter((args, kwargs))):
            with self.fake if self._makes_floats(function, kwargs) else contextlib.nullcontext():
                return function(*args, **kwargs)
        if function in FROM_INPUTS:
            return FROM_INPUTS[function]
        if function is aten.index.Tensor:  # how much a real mask chooses is known
            args = args[0], [place for given in args[1] for place in _places(given)], *args[2:]
        return function(*tree_map_only(Tensor, self._faked, args), **tree_map_only(Tensor, self._faked, kwargs))

    def _faked(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        with self.fake:  # its own way to do so keeps some real tensors alive
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)

    def _makes_floats(self, function, kwargs: dict) -> bool:
        """Whether an operation makes memory for floats out of nothing, which only FSDP does here."""
        floats = (kwargs.get("dtype") or torch.get_default_dtype()).is_floating_point
        return self.fake is not None and function in FACTORIES and floats

    def hold(self, tensor: Tensor, part: str) -> None:
        """Counts a tensor as this part's from now on."""
        storage, key = tensor.untyped_storage(), _key(tensor)
        self._release(key)
        self.held[key] = part, storage.nbytes(), weakref.ref(storage, lambda _: self._release(key))
        self._add(part, storage.nbytes())

    def settle(self) -> None:
        """Forgets what was held at most until now."""
        self.most, self.peak = Counter(self.now), self.total

    def __enter__(self) -> "MemoryTracker":
        self.resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> None:  # FSDP's way to free what it has gathered
            self.resize(storage, size)
            if storage._cdata in self.held:
                part, before, reference = self.held[storage._cdata]
                self.held[storage._cdata] = part, size, reference
                self._add(part, size - before)

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *error) -> None:
        torch.UntypedStorage.resize_ = self.resize
        super().__exit__(*error)

    def _release(self, key: int) -> None:
        if key in self.held:
            part, size, _ = self.held.pop(key)
            self._add(part, -size)

    def _add(self, part: str, size: int) -> None:
        self.now[part] += size
        self.most[part] = max(self.most[part], self.now[part])
        if part not in self.elsewhere:
            self.total += size
            self.peak = max(self.peak, self.total)


def _key(tensor: Tensor) -> int:
    """The same for all views of a tensor's memory."""
    return tensor.untyped_storage()._cdata


def _in_head() -> bool:
    """Whether the backward pass is in the output layer."""
    node = torch._C._current_autograd_node()
    return getattr(type(node), "_forward_cls", Tensor).__module__ in HEAD


def _places(index: Tensor | None) -> Iterable[Tensor | None]:
    real_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
    return index.nonzero(as_tuple=True) if real_mask else (index,)


# -------------------------------------------------------------------------------------------------------- one step


@dataclass
class Step:
    """What a step is made of. `batches` are micro-batches, `held_out` one of an evaluation."""

    config: Config
    loss: Loss
    policy: nn.Module
    models: Models
    parallel: SingleDevice
    batches: list[Batch]
    held_out: Batch | None = None


def take(step: Step, ledger: MemoryTracker) -> None:
    """Takes a step as in the middle of a training, when the optimizer has its moments, and evaluates."""
    trained = [parameter for parameter in step.policy.parameters() if parameter.requires_grad]
    precision = Precision(DTYPES[step.config.model.policy_dtype], CPU)
    for tensor in (*step.policy.parameters(), *step.policy.buffers()):
        ledger.hold(local_shard(tensor)[0], "weights")
    for name, model in step.models.frozen().items():
        for tensor in model.tensors():
            ledger.hold(local_shard(tensor)[0], name)
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda p: ledger.hold(local_shard(p.grad)[0], "gradients"))
    _tell_head(step.policy, ledger)
    with ledger:
        optimizer = build_optimizer(step.policy, step.config)
        optimizer.register_step_pre_hook(lambda *_: setattr(ledger, "part", "optimizer"))
        optimizer.register_step_post_hook(lambda *_: _hold_moments(optimizer, ledger))
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
            ledger.hold(local_shard(parameter.grad)[0], "gradients")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ledger.settle()
        output = forward_backward(step.loss, step.batches, step.models, step.parallel, precision)
        norm = step.config.max_grad_norm
        optim_step(optimizer, trained, output.loss, step.config.lr, norm, step.parallel, precision)
        if step.held_out is not None:
            with inference(step.policy), precision.autocast():
                step.loss(step.held_out, step.models)
            step.parallel.reshard(step.policy)


def _hold_moments(optimizer: torch.optim.Optimizer, ledger: MemoryTracker) -> None:
    ledger.part = "activations"
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                ledger.hold(local_shard(value)[0], "optimizer")


def _tell_head(policy: nn.Module, ledger: MemoryTracker) -> None:
    """Has the ledger know when the policy is in its output layer."""
    lm_head = policy.lm_head

    def told(hidden: Tensor):
        ledger.part = "head"
        return lm_head(hidden)

    policy.lm_head = told
    policy.register_forward_hook(lambda *_: setattr(ledger, "part", "activations"))


# ------------------------------------------------------------------------------------------------ without weights


@dataclass
class Estimate:
    """Bytes of one device. The parts are what each holds at most, which need not be at the same time."""

    parts: dict[str, int]
    peak: int  # of all parts but those elsewhere
    elsewhere: frozenset[str]


def estimate(run: Preparation, device: torch.device, devices: int = 1) -> Estimate:
    """The memory of the training on each of so many devices, with the largest micro-batch of the first epoch.

    Raises ConfigError for devices that the config does not fit, and whatever a model raises that cannot run so.
    """
    _check_devices(run.config, devices)
    offloads = run.config.fsdp.cpu_offload and device.type != "cpu"
    fake = FakeTensorMode()
    ledger = MemoryTracker(fake, OFFLOADED if offloads else frozenset())
    with _parallel(run.config, devices, fake) as parallel, _head_of(device.type):
        take(_step(run, parallel, fake, ledger), ledger)
    return Estimate({part: ledger.most[part] for part in PARTS if ledger.most[part]}, ledger.peak, ledger.elsewhere)


def eval_metrics(run: Preparation) -> list[str]:
    """Return the names of the metrics of an evaluation. Raises whatever a model raises that cannot run so."""
    fake = FakeTensorMode()
    ledger = MemoryTracker(fake)
    with _parallel(run.config, 1, fake) as parallel:
        step = _step(run, parallel, fake, ledger)
        precision = Precision(DTYPES[run.config.model.policy_dtype], CPU)
        with ledger, inference(step.policy), precision.autocast():
            output = run.loss(step.held_out, step.models)
    any_means = dict.fromkeys(["loss", *output.metrics], 0.5)  # 0.5: x and x^2 have a variance above 0
    means = run.loss.finalize_metrics(any_means)
    samples = {name: [0.0, 1.0] for name in output.samples}
    answers = ["exact_match"] * (run.config.eval_generate.n_examples > 0)
    return [*means, *run.loss.compute_eval_metrics(samples), *answers]


def _step(run: Preparation, parallel: SingleDevice, fake: FakeTensorMode, ledger: MemoryTracker) -> Step:
    """The largest step of a run, with fake tensors for parameters."""
    config, loss, tokenizer = dataclasses.replace(run.config, compile=False), run.loss, run.template.tokenizer
    precision = Precision(DTYPES[config.model.policy_dtype], CPU)
    policy = _faked(run.meta_policy(quantized=True), fake)
    loaders = [
        make_loader(examples, config, tokenizer, policy, parallel.rank, parallel.world_size)
        for examples in (run.data.train, run.data.eval)
        if examples
    ]
    batches = [_largest(loader, held_out) for loader, held_out in zip(loaders, (False, True))]

    def load(*asked) -> nn.Module:
        return _faked(build_frozen(*asked, META), fake)

    with ledger:
        policy = prepare_policy(policy, None, config, parallel, precision, loss.dropout)
        if "reference" in loss.requires and reference_kind(loss, config) == "precomputed":
            models = Models(policy, PrecomputedRefLogps())
            for batch in batches:
                batch.token_features[REF_LOGPS] = torch.zeros(batch.input_ids.shape)
        else:
            models = build_aux_models(loss, config, policy, tokenizer, parallel, precision, loaders, load)
    several = 2 if config.gradient_accumulation_steps > 1 else 1  # the second one finds gradients there
    return Step(config, loss, policy, models, parallel, batches[:1] * several, *batches[1:])


def _faked(policy: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """A policy on the meta device with fake tensors, which say that they are on the CPU, in the place of its own."""

    @functools.cache  # by the tensor itself, so that what is tied stays so
    def faked(tensor: Tensor) -> Tensor:
        with fake:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=CPU)
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    for module in policy.modules():
        for own in (module._parameters, module._buffers):
            own |= {name: faked(tensor) for name, tensor in own.items() if tensor is not None and tensor.is_meta}
    policy.check = lambda *asked: None  # there are no values to compare
    return policy


def _largest(loader: MicrobatchLoader, held_out: bool) -> Batch:
    """The micro-batch with the most places over all ranks, of the first epoch or of an evaluation."""
    if held_out:
        found = list(loader.eval_layout())
    else:
        found = [rows for step in loader.epoch_plan() for mine in step for rows in mine]
    places = [(len(widths) * max(widths, default=0), sum(widths)) for widths in loader.widths(found)]
    return loader.batch(found[max(range(len(found)), key=places.__getitem__)])


def _check_devices(config: Config, devices: int) -> None:
    if devices > 1 and config.trainer == "BasicTrainer":
        raise ConfigError(
            f"trainer: BasicTrainer trains on one device, and not on {devices}; set trainer=FSDPTrainer.", "conflict"
        )
    if uneven := uneven_batch(config, devices, "devices"):
        raise ConfigError(f"total_batch_size: {uneven}", "conflict")


class _LocalRank(SingleDevice):
    def wrap(self, policy: nn.Module, *ignored) -> nn.Module:
        return policy  # which cannot be moved


class _FakeRank(FullySharded):
    """The first of many ranks that are not there."""

    def __init__(self, options: FSDPConfig, fake: FakeTensorMode):
        SingleDevice.__init__(self, CPU)
        self.options, self.fake = options, fake
        self.lay_out()

    def wrap(self, *asked) -> nn.Module:
        with self.fake:
            return super().wrap(*asked)


@contextlib.contextmanager
def _parallel(config: Config, devices: int, fake: FakeTensorMode) -> Iterator[SingleDevice]:
    if config.trainer == "BasicTrainer":
        yield _LocalRank(CPU)
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # What hybrid cuts up is cut inside one machine, as full does.
    shard = "full" if config.fsdp.shard == "hybrid" else config.fsdp.shard
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=devices)
    try:
        yield _FakeRank(dataclasses.replace(config.fsdp, shard=shard, cpu_offload=False), fake)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _head_of(kind: str) -> Iterator[None]:
    """Inside, the output layer cuts its chunks as on this kind of device, though tensors say they are on the CPU."""
    if kind == "cpu":
        yield
        return
    budget = logprobs.CHUNK_BYTES.get(kind, logprobs.CHUNK_BYTES["cuda"])
    keeps_float32_sums = logprobs.keeps_float32_sums
    stand_ins = {
        "CHUNK_BYTES": logprobs.CHUNK_BYTES | {"cpu": budget},
        "cpu_has_bfloat16": lambda: True,
        "cpu_has_float16": lambda: True,
        "keeps_float32_sums": lambda _: keeps_float32_sums(kind),
    }
    own = {name: getattr(logprobs, name) for name in stand_ins}
    vars(logprobs).update(stand_ins)
    try:
        yield
    finally:
        vars(logprobs).update(own)
