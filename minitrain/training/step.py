"""An optimizer step in two halves, the gradients of all its micro-batches and the update, and an evaluation.

The trainer, the memory estimate and your own training loops call the same functions. Means do not depend on the batch
layout: they are sums over items, divided once at the end.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minitrain.batch import Batch
from minitrain.distributed.parallel import SingleDevice, local_shard
from minitrain.errors import ConfigError, RunError
from minitrain.losses import Loss, LossOutput, Models

from .failpoints import failpoint
from .optimizers import InBackward, non_finite_in_backward, set_lr
from .router_step import RouterStep, load_metrics

FIRST_SCALE = 2.0**16
GROWTH_INTERVAL = 2000  # clean steps before the scale is doubled
SMALLEST_SCALE = 2.0**-10


@dataclass
class Precision:
    """Autocast and loss scaling. Parameters keep their own dtype, float32 by default.

    Small gradients underflow in float16, so the loss is multiplied by `scale` before the backward pass, and the
    gradients are divided by it afterwards. An overflow halves the scale, and the step is skipped.
    """

    dtype: torch.dtype
    device: torch.device
    scale: float = 1.0
    clean_steps: int = 0

    def __post_init__(self):
        if self.dtype == torch.float16:
            self.scale = FIRST_SCALE

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def backward(self, loss: torch.Tensor) -> None:
        (loss * self.scale).backward()

    def unscale(self, parameters: list[torch.nn.Parameter]) -> None:
        """Divide the gradients by the scale. Call it once per step, before clipping."""
        if self.scale != 1.0:
            grads = [p.grad for p in parameters if p.grad is not None]
            torch._foreach_mul_(grads, 1.0 / self.scale)

    def update(self, overflow: bool) -> None:
        """Adapt the scale after a step. Raise RunError if the gradients overflow at every scale."""
        if self.dtype != torch.float16:
            return
        if overflow:
            self.scale, self.clean_steps = self.scale / 2, 0
            if self.scale < SMALLEST_SCALE:
                raise RunError(
                    "gradients overflow float16 at every loss scale. Set model.policy_dtype=bfloat16.", "not-finite"
                )
        else:
            self.clean_steps += 1
            if self.clean_steps == GROWTH_INTERVAL:
                self.scale, self.clean_steps = self.scale * 2, 0

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale, "clean_steps": self.clean_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.scale, self.clean_steps = state["scale"], state["clean_steps"]


class MetricAccumulator:
    """Sums of a loss and its metrics over micro-batches, steps and ranks, in float64."""

    def __init__(self, device: torch.device):
        self.device = device
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.tables: dict[tuple[str, ...], torch.Tensor] = {}  # names -> their (sum, weight), [M, 2]
        self.samples: dict[str, list[float]] = {}
        self.load: torch.Tensor | None = None  # [L, E] tokens of each expert

    def add(self, output: LossOutput) -> None:
        """Add the sums of a micro-batch, all at once: each kernel on a GPU costs more than its few numbers."""
        pairs = {"loss": (output.loss_sum, output.num_items), **output.metrics}
        numbers = [number.detach() for pair in pairs.values() for number in pair]
        table = torch.stack(numbers).to(self.dtype).view(-1, 2)  # [M, 2]
        names = tuple(pairs)
        self.tables[names] = self.tables[names] + table if names in self.tables else table

    @property
    def sums(self) -> dict[str, torch.Tensor]:
        """Return (sum, weight) of each metric, shape [2] each."""
        sums: dict[str, torch.Tensor] = {}
        for names, table in self.tables.items():
            for name, pair in zip(names, table, strict=True):
                sums[name] = sums[name] + pair if name in sums else pair
        return sums

    def add_samples(self, output: LossOutput) -> None:
        for name, tensor in output.samples.items():
            self.samples.setdefault(name, []).extend(tensor.tolist())

    def add_load(self, load: Tensor | None) -> None:
        """Add the load of the experts on this rank; None for a dense model."""
        if load is not None:
            self.load = load if self.load is None else self.load + load

    def means(self, parallel: SingleDevice) -> dict[str, float]:
        """Return the mean of each metric over all ranks, and metrics of the load. One that no rank has is left out."""
        # Some ranks may have no value of a metric, and all ranks must sum in the same order.
        sums = self.sums
        names = dict.fromkeys(name for known in parallel.gather(list(sums)) for name in known)
        if not names:
            return {}
        zero = torch.zeros(2, dtype=self.dtype, device=self.device)
        totals = parallel.sum(torch.stack([sums.get(name, zero) for name in names])).tolist()  # [M, 2]
        means = {name: total / weight for name, (total, weight) in zip(names, totals, strict=True) if weight}
        return means if self.load is None else means | load_metrics(parallel.sum(self.load))

    def all_samples(self, parallel: SingleDevice) -> dict[str, list[float]]:
        """Return the samples of all ranks."""
        merged: dict[str, list[float]] = {}
        for samples in parallel.gather(self.samples):
            for name, numbers in samples.items():
                merged.setdefault(name, []).extend(numbers)
        return merged


@dataclass
class StepOutput:
    """What `forward_backward` computed.

    Attributes:
        loss: Mean loss over all micro-batches and ranks, with the router's auxiliary loss; shape [], the same on every
            rank.
        outputs: The detached output of the loss for each micro-batch of this rank.
        parallel: The ranks that computed it.
        load: Tokens that each expert computed on this rank, int64, shape [L, E]; None for a dense model.
    """

    loss: Tensor
    outputs: list[LossOutput]
    parallel: SingleDevice
    load: Tensor | None = None

    def __repr__(self) -> str:
        return f"<StepOutput: loss {float(self.loss):.4g}, micro-batches {len(self.outputs)}>"

    def metrics(self) -> dict[str, float]:
        """Return the mean of each metric over all micro-batches and ranks. All ranks must call it."""
        totals = MetricAccumulator(self.loss.device)
        for output in self.outputs:
            totals.add(output)
        totals.add_load(self.load)
        return totals.means(self.parallel)


class Update(NamedTuple):
    """What `optim_step` did.

    Attributes:
        loss: The loss of the step.
        grad_norm: Norm of all gradients before clipping.
        taken: Whether the weights were updated. They are not if the loss or a gradient is not finite.
        overflowed: Whether the loss scale of float16 was too large. The loss itself was finite.
    """

    loss: float
    grad_norm: float
    taken: bool
    overflowed: bool


def forward_backward(
    loss: Loss,
    batches: Sequence[Batch],
    models: Models,
    parallel: SingleDevice,
    precision: Precision,
) -> StepOutput:
    """Accumulate the gradients of one optimizer step, divided by the number of items of all micro-batches and ranks.

    Args:
        batches: The micro-batches of this rank. Every rank has the same number of them.

    Returns:
        The mean loss and the outputs of the micro-batches. The gradients are in `.grad`.
    """
    if isinstance(batches, Batch) or not batches:
        got = "a Batch" if isinstance(batches, Batch) else repr(batches)
        raise ConfigError(f"batches: expected a list of Batch, got {got}. Give [batch, ...].", "wrong-type")
    weight = parallel.sum(sum(loss.num_items(batch) for batch in batches))  # [] on the CPU
    total = torch.zeros((), device=parallel.device)
    outputs = []
    with precision.autocast():
        share_step_statistics(loss, batches, models, parallel)
        share_step_rows(loss, batches, models, parallel)
        router = RouterStep(models.policy, batches, parallel)
    for i, batch in enumerate(batches):
        batch = batch.to(parallel.device)
        failpoint("step.batch")
        with parallel.backward_context(models.policy, last=i == len(batches) - 1):
            with precision.autocast(), router.recording():
                output = loss(batch, models)
            output.loss_sum = failpoint("step.loss", output.loss_sum)
            failpoint("step.backward")
            precision.backward(output.loss_sum / weight + router.add(output))
        total = total + output.loss_sum.detach()
        outputs.append(_detached(output))
    failpoint("step.reduce")
    return StepOutput(parallel.sum(total) / weight + router.loss(), outputs, parallel, router.load)


def optim_step(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    loss: Tensor,
    lr: float,
    max_grad_norm: float,
    parallel: SingleDevice,
    precision: Precision,
) -> Update:
    """Unscale and clip the gradients, update the parameters if loss and gradients are finite, and clear the gradients.

    Args:
        loss: The loss of `forward_backward`, shape [].
        lr: Learning rate of this update.
        max_grad_norm: The norm that gradients are clipped to; 0 does not clip.

    Raises:
        RunError: If float16 overflows at every loss scale, or an optimizer in the backward pass has used a gradient
            that is not finite.
    """
    in_backward = isinstance(optimizer, InBackward)
    precision.unscale(parameters)
    norm = optimizer.grad_norm(parallel) if in_backward else parallel.grad_norm(parameters)  # []
    # The only time in a step that the host waits for the device.
    loss, norm = torch.stack([loss.to(norm.device), norm]).tolist()
    loss_is_finite = math.isfinite(loss)
    taken = loss_is_finite and math.isfinite(norm)
    overflowed = loss_is_finite and not taken and precision.scale > 1  # expected now and then while the scale adapts
    if in_backward and not taken:
        raise non_finite_in_backward()
    if taken and not in_backward:
        clip_gradients(parameters, norm, max_grad_norm)
        set_lr(optimizer, lr)
        optimizer.step()
    precision.update(overflow=not taken)
    for parameter in parameters:
        parameter.grad = None
    return Update(loss, norm, taken, overflowed)


def clip_gradients(parameters: Sequence[nn.Parameter], norm: float, max_norm: float) -> None:
    """Scale gradients with this norm to `max_norm`, if they are above it; 0 does not clip."""
    if 0 < max_norm < norm + 1e-6:
        grads = [local_shard(parameter.grad)[0] for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(grads, max_norm / (norm + 1e-6))


def _detached(output: LossOutput) -> LossOutput:
    """Return the output without its autograd graph, and without samples, which only an evaluation needs."""
    metrics = {name: (total.detach(), weight.detach()) for name, (total, weight) in output.metrics.items()}
    return dataclasses.replace(output, loss_sum=output.loss_sum.detach(), metrics=metrics, samples={})


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Use eval mode without gradients. Restore each module's mode and the RNG state afterwards."""
    modes = {module: module.training for module in model.modules()}
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training


def share_step_statistics(loss: Loss, batches: Iterable[Batch], models: Models, parallel: SingleDevice) -> None:
    """Sum a loss's step statistics over all batches and ranks, and pass the sums to the loss."""
    if not loss.has_step_statistics:
        return
    with torch.no_grad():
        sums = [loss.step_statistics(batch.to(parallel.device), models) for batch in batches]
    loss.set_step_statistics(parallel.sum(torch.stack(sums).sum(0)))


def share_step_rows(loss: Loss, batches: Iterable[Batch], models: Models, parallel: SingleDevice) -> None:
    """Gather a loss's rows of all batches and ranks, and pass them to the loss."""
    if not loss.gathers_rows:
        return
    if isinstance(batches, Sequence) and len(batches) == parallel.world_size == 1:
        loss.set_step_rows(None, None, slice(0))
        return
    with torch.no_grad():
        parts = [loss.step_rows(batch.to(parallel.device), models) for batch in batches]
    rows, numbers = (parallel.gather_tensors(torch.cat(each)) for each in zip(*parts, strict=True))  # by rank
    start = sum(map(len, rows[: parallel.rank]))
    own = slice(start, start + len(rows[parallel.rank]))
    loss.set_step_rows(torch.cat(rows), torch.cat(numbers), own)


def evaluate(
    loss: Loss,
    batches: Callable[[], Generator[Batch, None, None]],
    models: Models,
    parallel: SingleDevice,
    precision: Precision,
    stop: Callable[[], bool] = lambda: False,
    on_output: Callable[[LossOutput], object] = lambda output: None,
) -> dict[str, float]:
    """Compute mean loss and metrics, which do not depend on batch size and number of ranks.

    Args:
        batches: Returns the batches of this rank. It is called twice if the loss has step statistics or gathers rows.
        stop: Whether to stop early. All ranks must get the same answer.
        on_output: Receives the output of the loss for each batch of this rank.

    Returns:
        The metrics, or {} after an early stop.
    """
    totals = MetricAccumulator(parallel.device)
    with inference(models.policy), precision.autocast():
        share_step_statistics(loss, batches(), models, parallel)
        share_step_rows(loss, batches(), models, parallel)
        with contextlib.closing(batches()) as each:
            for batch in each:
                failpoint("eval.batch")
                if stop():
                    return {}
                output = loss(batch.to(parallel.device), models)
                totals.add(output)
                totals.add_samples(output)
                on_output(output)
    parallel.reshard(models.policy)
    return loss.finalize_metrics(totals.means(parallel)) | loss.compute_eval_metrics(totals.all_samples(parallel))
