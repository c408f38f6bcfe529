"""Estimate the peak memory of a training, and what takes it, without loading weights.

The code that trains (policy, loss, optimizer, sharding) runs one step with PyTorch's fake tensors, which have shapes
but no memory. A tracker counts each tensor that is allocated and freed. Only integers are real, since they hold the
layout of documents. So nothing here depends on what a layer keeps, and new layers are counted too.
"""

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from minitrain.batch import Batch
from minitrain.config.schema import Config
from minitrain.config.sections import FSDPConfig
from minitrain.data.loader import MicrobatchLoader
from minitrain.distributed.checks import uneven_batch
from minitrain.distributed.parallel import SingleDevice, local_shard
from minitrain.distributed.sharded import FullySharded
from minitrain.errors import ConfigError
from minitrain.inference.evaluation import answer_names
from minitrain.losses import Loss, Models
from minitrain.model import logprobs
from minitrain.model.load import CPU, DTYPES, META, build_frozen
from minitrain.model.load_check import uses_fsdp
from minitrain.model.offload import HostCopies
from minitrain.training.aux_models import REF_LOGPS, PrecomputedRefLogps, build_aux_models, reference_kind
from minitrain.training.drift import add_start, against_start, drift_names, kl_loss
from minitrain.training.optim import build_optimizer
from minitrain.training.optim_state import named_state
from minitrain.training.setup import Preparation, make_loader, prepare_policy
from minitrain.training.step import Precision, forward_backward, inference, optim_step

from .memory_rounds import (
    JUDGES,
    Judge,
    build_judges,
    can_simulate,
    conversation_limit,
    longest_round,
    simulate_judging,
    simulate_sampling,
)
from .memory_rounds import PARTS as SAMPLING
from .memory_tracker import MemoryTracker

HOST_COPIES = "activations kept"  # by activation_offload
PARTS = (
    "weights",
    "reference",
    "teacher",
    "start",
    JUDGES,
    "gradients",
    "optimizer",
    *SAMPLING,
    "activations",
    HOST_COPIES,
    "head",
    "gathered",
)
OFFLOADED = frozenset({"weights", "gradients", "optimizer"})  # by fsdp.cpu_offload

# -------------------------------------------------------------------------------------------------------- one step


@dataclass
class StepInputs:
    """The inputs of a simulated step: `batches` are its micro-batches; `eval_batch` is evaluated after it."""

    config: Config
    loss: Loss
    policy: nn.Module
    models: Models
    parallel: SingleDevice
    batches: list[Batch]
    eval_batch: Batch | None = None
    judges: Sequence[Judge] = ()
    optimizer: torch.optim.Optimizer | None = None  # after the step; its moments stay


def simulate_step(step: StepInputs, tracker: MemoryTracker) -> None:
    """Run a step with initialized optimizer moments, as in the middle of a training, and an evaluation."""
    trained = [parameter for parameter in step.policy.parameters() if parameter.requires_grad]
    precision = Precision(DTYPES[step.config.model.policy_dtype], CPU)
    for tensor in (*step.policy.parameters(), *step.policy.buffers()):
        tracker.hold(local_shard(tensor)[0], "weights")
    for name, model in (*step.models.frozen().items(), *((JUDGES, judge.model) for judge in step.judges)):
        for tensor in model.tensors():
            tracker.hold(local_shard(tensor)[0], name)
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda p: tracker.hold(local_shard(p.grad)[0], "gradients"))
    _track_head(step.policy, tracker)
    if step.policy.host_copies is not None:
        _track_host_copies(step.policy.host_copies, tracker)
    with tracker:
        optimizer = step.optimizer = build_optimizer(step.policy, step.config)
        for parameter in trained:  # those that the optimizer has the master weights of are new
            tracker.hold(local_shard(parameter)[0], "weights")
        optimizer.register_step_pre_hook(lambda *_: setattr(tracker, "part", "optimizer"))
        optimizer.register_step_post_hook(
            lambda *_: _hold_moments(dict(step.policy.named_parameters()), optimizer, tracker)
        )
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
            tracker.hold(local_shard(parameter.grad)[0], "gradients")
        optimizer.step()
        for parameter in trained:
            parameter.grad = None
        tracker.reset_peaks()
        output = forward_backward(step.loss, step.batches, step.models, step.parallel, precision)
        norm = step.config.max_grad_norm
        optim_step(optimizer, trained, output.loss, step.config.lr, norm, step.parallel, precision)
        if step.eval_batch is not None:
            with inference(step.policy), precision.autocast():
                step.loss(step.eval_batch, step.models)
                if step.models.start is not None:
                    kl_loss()(step.eval_batch, against_start(step.models))
            step.parallel.reshard(step.policy)


def _hold_moments(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, tracker: MemoryTracker
) -> None:
    tracker.part = "activations"
    for tensor in named_state(parameters, optimizer, rank=0)[0].values():
        tracker.hold(local_shard(tensor)[0], "optimizer")


def _track_head(policy: nn.Module, tracker: MemoryTracker) -> None:
    """Make `head` the active part of the tracker while the policy is in its LM head."""
    lm_head = policy.lm_head

    def tracked(hidden: Tensor):
        tracker.part = "head"
        return lm_head(hidden)

    policy.lm_head = tracked
    policy.register_forward_hook(lambda *_: setattr(tracker, "part", "activations"))


def _track_host_copies(copies: HostCopies, tracker: MemoryTracker) -> None:
    """Make `HOST_COPIES` the active part of the tracker while an input is copied to the host."""
    save = copies.save

    def tracked(tensor: Tensor):
        before, tracker.part = tracker.part, HOST_COPIES
        copy = save(tensor)
        tracker.part = before
        return copy

    copies.save = tracked


# ------------------------------------------------------------------------------------------------ without weights


@dataclass
class MemoryEstimate:
    """Peak bytes of one device."""

    parts: dict[str, int]  # of each part, not necessarily at the same time
    peak: int  # of all parts on the device together
    elsewhere: frozenset[str]  # parts that are not on the device
    sampling: "MemoryEstimate | None" = None  # while answers are sampled
    judging: "MemoryEstimate | None" = None  # while models judge them


def estimate_memory(run: Preparation, device: torch.device, devices: int = 1) -> MemoryEstimate:
    """Estimate the peak memory of each of `devices` devices, with the largest micro-batch of the first epoch.

    Raises:
        ConfigError: The config cannot train on this number of devices.
        Exception: Anything that a model raises which needs the values of its tensors.
    """
    _check_devices(run.config, devices)
    offloads = run.config.fsdp.cpu_offload and device.type != "cpu"
    fake = FakeTensorMode()
    elsewhere = (OFFLOADED if offloads else set()) | ({HOST_COPIES} if run.config.activation_offload else set())
    tracker = MemoryTracker(fake, frozenset(elsewhere))
    with _parallel(run.config, devices, fake) as parallel, _head_chunks_of(device.type):
        step = _step_inputs(run, parallel, fake, tracker)
        simulate_step(step, tracker)
        estimate = _estimate(tracker)
        if run.loss.online and can_simulate(run.config, step.policy):
            precision = Precision(DTYPES[run.config.model.policy_dtype], CPU)
            with_graphs = device.type == "cuda" and not uses_fsdp(step.policy)
            simulate_sampling(step.policy, run.data.train, run.config, parallel, precision, tracker, with_graphs)
            estimate.sampling = _estimate(tracker)
        if step.judges:
            simulate_judging(step.judges, run.data.train, run.config, step.policy, parallel, tracker)
            estimate.judging = _estimate(tracker)
    return estimate


def _estimate(tracker: MemoryTracker) -> MemoryEstimate:
    parts = {part: tracker.peaks[part] for part in PARTS if tracker.peaks[part]}
    return MemoryEstimate(parts, tracker.peak, tracker.elsewhere)


def eval_metrics(run: Preparation) -> list[str]:
    """Return the names of the evaluation metrics. Raises anything that a model raises which needs values."""
    fake = FakeTensorMode()
    tracker = MemoryTracker(fake)
    with _parallel(run.config, 1, fake) as parallel:
        step = _step_inputs(run, parallel, fake, tracker)
        precision = Precision(DTYPES[run.config.model.policy_dtype], CPU)
        with tracker, inference(step.policy), precision.autocast():
            output = run.loss(step.eval_batch, step.models)
    any_means = dict.fromkeys(["loss", *output.metrics], 0.5)  # 0.5: x and x^2 have a variance above 0
    means = run.loss.finalize_metrics(any_means)
    samples = {name: [0.0, 1.0] for name in output.samples}
    answers = answer_names(run.config.eval_generate)
    return [*means, *run.loss.compute_eval_metrics(samples), *answers, *drift_names(run.config, run.loss.online)]


def _step_inputs(run: Preparation, parallel: SingleDevice, fake: FakeTensorMode, tracker: MemoryTracker) -> StepInputs:
    """Return the inputs of the largest step of a run, with fake tensors for parameters."""
    config, loss, tokenizer = dataclasses.replace(run.config, compile=False), run.loss, run.template.tokenizer
    precision = Precision(DTYPES[config.model.policy_dtype], CPU)
    policy = _to_fake(run.meta_policy(quantized=True), fake)
    policy.groups_documents = run.policy.groups_documents
    rest = config, tokenizer, policy, parallel.rank, parallel.world_size
    loaders = [make_loader(examples, *rest) for examples in (run.data.train, run.data.eval) if examples]
    if loss.online:
        answered = longest_round(run.data.train, config, loss, conversation_limit(config, policy))
        batches = [_largest_batch(make_loader(answered, *rest), False)]
    else:
        batches = [_largest_batch(loader, eval_batch) for loader, eval_batch in zip(loaders, (False, True))]

    def load(*args) -> nn.Module:
        return _to_fake(build_frozen(*args, META), fake)

    with tracker:
        policy = prepare_policy(policy, None, config, parallel, precision, loss.dropout)
        if "reference" in loss.requires and reference_kind(loss, config) == "precomputed":
            models = Models(policy, PrecomputedRefLogps())
            for batch in batches:
                batch.token_features[REF_LOGPS] = torch.zeros(batch.input_ids.shape)
        else:
            models = build_aux_models(loss, config, policy, tokenizer, parallel, precision, loaders, load)
        models = add_start(models, loss, config, tokenizer, parallel, precision, load)
        judges = build_judges(config, tokenizer, parallel, lambda judge: _to_fake(judge, fake)) if loss.online else []
    # The second micro-batch adds to gradients.
    several = 2 if config.gradient_accumulation_steps > 1 or config.max_tokens_per_micro_batch else 1
    return StepInputs(config, loss, policy, models, parallel, batches[:1] * several, *batches[1:], judges=judges)


def _to_fake(policy: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """Replace the meta tensors of a policy by fake tensors that claim to be on the CPU."""

    @functools.cache  # cached by tensor, so that tied parameters stay tied
    def fake_of(tensor: Tensor) -> Tensor:
        with fake:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=CPU)
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    for module in policy.modules():
        for own in (module._parameters, module._buffers):
            own |= {name: fake_of(tensor) for name, tensor in own.items() if tensor is not None and tensor.is_meta}
    return policy


def _largest_batch(loader: MicrobatchLoader, eval_batch: bool) -> Batch:
    """Return the micro-batch with the most positions over all ranks, of the first epoch or of an evaluation."""
    if eval_batch:
        layout = list(loader.eval_layout())
    else:
        layout = [rows for step in loader.epoch_plan() for local in step for rows in local]
    sizes = [(len(widths) * max(widths, default=0), sum(widths)) for widths in loader.widths(layout)]
    return loader.batch(layout[max(range(len(layout)), key=sizes.__getitem__)])


def _check_devices(config: Config, devices: int) -> None:
    if devices > 1 and config.trainer == "BasicTrainer":
        raise ConfigError(
            f"trainer: BasicTrainer trains on one device, got {devices}. Set trainer=FSDPTrainer.", "conflict"
        )
    if uneven := uneven_batch(config, devices, "devices"):
        raise ConfigError(f"total_batch_size: {uneven}", "conflict")


class _LocalRank(SingleDevice):
    def wrap(self, policy: nn.Module, *ignored) -> nn.Module:
        return policy  # fake tensors cannot be moved


class _FakeRank(FullySharded):
    """The first rank of a process group without other processes."""

    def __init__(self, options: FSDPConfig, fake: FakeTensorMode):
        SingleDevice.__init__(self, CPU)
        self.options, self.fake, self.kept_gathered = options, fake, weakref.WeakSet()
        self.set_layout()

    def wrap(self, *args) -> nn.Module:
        with self.fake:
            return super().wrap(*args)


@contextlib.contextmanager
def _parallel(config: Config, devices: int, fake: FakeTensorMode) -> Iterator[SingleDevice]:
    if config.trainer == "BasicTrainer":
        yield _LocalRank(CPU)
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # hybrid shards within one machine, as full does.
    shard = "full" if config.fsdp.shard == "hybrid" else config.fsdp.shard
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=devices)
    try:
        yield _FakeRank(dataclasses.replace(config.fsdp, shard=shard, cpu_offload=False), fake)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _head_chunks_of(kind: str) -> Iterator[None]:
    """Let the LM head choose its chunks for a type of device, although the fake tensors are on the CPU."""
    if kind == "cpu":
        yield
        return
    chunk_bytes, keeps_float32_sums = logprobs.chunk_bytes, logprobs.keeps_float32_sums
    stand_ins = {
        "chunk_bytes": lambda _: chunk_bytes(kind),
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
