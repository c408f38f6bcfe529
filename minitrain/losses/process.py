"""Process reward models: a score at the end of each step of a response."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minitrain.batch import Batch
from minitrain.config.schema import option

from .base import Loss, LossOutput, Models, register_loss, scalar
from .value import values_of


@dataclass
class ProcessOptions:
    positive_weight: float = option(1.0, "Weight of the steps that are labeled right, such as 0.5 if most are.", gt=0)


@register_loss("process", ProcessOptions)
class Process(Loss):
    """``-w y log sig(s) - (1 - y) log sig(-s)`` of the score s at the last token of each step; the unit is the step.

    y is the label of the step: 1 for a right one, 0 for a wrong one, or a probability (arXiv 2305.20050, 2312.08935).
    """

    example_type = "solution"

    @property
    def head_labels(self) -> list[str]:
        return ["score"]

    def num_items(self, batch: Batch) -> Tensor:
        return scalar(batch.n_targets, batch)

    def __call__(self, batch: Batch, models: Models) -> LossOutput:
        scores = values_of(models.policy(batch, at_targets=True), self.name)  # [N]
        labels = batch.target_feature("step_label").to(scores.dtype)  # [N]
        weight = torch.full_like(scores, self.options.positive_weight)
        losses = F.binary_cross_entropy_with_logits(scores, labels, pos_weight=weight, reduction="none")
        with torch.no_grad():
            right, n = (labels > 0.5).float(), self.num_items(batch)
            wrong, rewards = 1 - right, scores.sigmoid()
            metrics = {
                "accuracy": (((scores > 0) == (right > 0)).float().sum(), n),
                "reward/right": ((rewards * right).sum(), right.sum()),
                "reward/wrong": ((rewards * wrong).sum(), wrong.sum()),
            }
        return LossOutput(losses.sum(), n, metrics)
