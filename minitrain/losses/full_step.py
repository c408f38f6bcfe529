"""Losses of items that depend on one another over the full optimizer step, such as a sort or in-batch negatives.

The gradient is exact for any split into micro-batches and ranks (Gao et al. 2021, arXiv 2101.06983). A pass without
gradients computes what the losses depend on, a row for each item, and all ranks gather all rows. The losses of the step
and their derivatives with respect to the rows follow. The loss of a micro-batch is then linear in its own rows.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .base import Loss


class RowLosses(NamedTuple):
    """The losses of rows, and per-row numbers for metrics; shape [n] each."""

    losses: Tensor
    metrics: Mapping[str, Tensor] = {}


class FullStepLoss(Loss):
    """A loss whose `row_losses` maps the rows of all items of a step to their losses.

    `__call__` computes the rows of a micro-batch with gradients, and passes them to `losses_of`.
    """

    gathers_rows = True
    dropout = False  # both passes must compute the same

    def __init__(self, options: object):
        super().__init__(options)
        self.of_step: RowLosses | None = None  # without gradients; None if the micro-batch is the full step
        self.left = slice(0)  # the rows of the micro-batches of this rank that are left

    def row_losses(self, rows: Tensor, numbers: Tensor) -> RowLosses:
        """Return the losses of all items of a step, from their rows [n, K] and numbers [n, F]."""
        raise NotImplementedError

    def set_step_rows(self, rows: Tensor | None, numbers: Tensor | None, own: slice) -> None:
        self.of_step, self.left = None, own
        if rows is not None:
            with torch.enable_grad():
                leaf = rows.detach().requires_grad_()
                losses, metrics = self.row_losses(leaf, numbers)
                (self.slopes,) = torch.autograd.grad(losses.sum(), leaf)  # [n, K]
            self.of_step = RowLosses(losses.detach(), metrics)

    def losses_of(self, rows: Tensor, numbers: Tensor) -> RowLosses:
        """Return the losses of the next micro-batch, given its rows [m, K] and numbers [m, F]."""
        if self.of_step is None:
            return self.row_losses(rows, numbers)
        of_step, own = self.of_step, slice(self.left.start, self.left.start + len(rows))
        self.left = slice(own.stop, self.left.stop)
        if self.left.start == self.left.stop:
            self.of_step = None  # the step is over
        linear = ((rows - rows.detach()) * self.slopes[own]).sum(1)  # [m] 0, with the gradient of the step
        metrics = {name: values[own] for name, values in of_step.metrics.items()}
        return RowLosses(of_step.losses[own] + linear, metrics)
