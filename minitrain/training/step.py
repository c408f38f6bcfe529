"""An optimizer step in two halves: the gradients of all its micro-batches, then the update.

The trainer, the memory estimate and training loops of your own call the same two functions.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minitrain.batch import Batch
from minitrain.distributed.parallel import SingleDevice
from minitrain.losses import Loss, LossOutput, Models

from .failpoints import failpoint
from .metrics import MetricAccumulator, share_step_statistics
from .optim import set_lr
from .precision import Precision


@dataclass
class StepOutput:
    """What `forward_backward` computed.

    Attributes:
        loss: Mean loss over all micro-batches and ranks, shape [], the same on every rank.
        outputs: The detached output of the loss for each micro-batch of this rank.
        parallel: The ranks that took part.
    """

    loss: Tensor
    outputs: list[LossOutput]
    parallel: SingleDevice

    def metrics(self) -> dict[str, float]:
        """Return the mean of each metric over all micro-batches and ranks. Every rank has to call it."""
        totals = MetricAccumulator(self.loss.device)
        for output in self.outputs:
            totals.add(output)
        return totals.means(self.parallel)


class Update(NamedTuple):
    """What `optim_step` did.

    Attributes:
        grad_norm: Norm of all gradients before clipping.
        taken: Whether the weights were updated: not when the loss or a gradient is not finite.
        overflowed: Whether the loss scale of float16 was too large, which is no fault of the step.
    """

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
    """Add the gradients of one optimizer step: summed over micro-batches and ranks, then divided once.

    Args:
        batches: The micro-batches of this rank. Every rank has the same number of them.
    """
    weight = sum(loss.num_items(batch) for batch in batches)
    weight = parallel.sum(weight.to(parallel.device))  # []
    total = torch.zeros((), device=parallel.device)
    outputs = []
    with precision.autocast():
        share_step_statistics(loss, batches, models, parallel)
    for i, batch in enumerate(batches):
        batch = batch.to(parallel.device)
        failpoint("step.batch")
        with parallel.backward_context(models.policy, last=i == len(batches) - 1):
            with precision.autocast():
                output = loss(batch, models)
            output.loss_sum = failpoint("step.loss", output.loss_sum)
            failpoint("step.backward")
            precision.backward(output.loss_sum / weight)
        total = total + output.loss_sum.detach()
        outputs.append(_detached(output))
    failpoint("step.reduce")
    return StepOutput(parallel.sum(total) / weight, outputs, parallel)


def optim_step(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    loss: Tensor,
    lr: float,
    max_grad_norm: float,
    parallel: SingleDevice,
    precision: Precision,
) -> Update:
    """Unscale and clip the gradients, update the parameters if all is finite, and clear the gradients.

    Args:
        loss: That of `forward_backward`, shape [].
        lr: Learning rate of this update.
        max_grad_norm: The norm that gradients are scaled down to; 0 does not clip.

    Raises:
        RunError: When float16 overflows at every loss scale.
    """
    precision.unscale(parameters)
    norm = float(parallel.clip_grad_norm(parameters, max_grad_norm))
    loss_is_finite = math.isfinite(float(loss))
    taken = loss_is_finite and math.isfinite(norm)
    overflowed = loss_is_finite and not taken and precision.scale > 1  # what loss scaling is there to find out
    if taken:
        set_lr(optimizer, lr)
        optimizer.step()
    precision.update(overflow=not taken)
    optimizer.zero_grad(set_to_none=True)
    return Update(norm, taken, overflowed)


def _detached(output: LossOutput) -> LossOutput:
    """Return the same numbers without their graph, and without samples, which only an evaluation needs."""
    metrics = {name: (total.detach(), weight.detach()) for name, (total, weight) in output.metrics.items()}
    return dataclasses.replace(output, loss_sum=output.loss_sum.detach(), metrics=metrics, samples={})
