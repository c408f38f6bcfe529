"""Reward models trained on preference pairs."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minitrain.batch import Batch
from minitrain.config.schema import option

from .base import LossOutput, Models, PairLoss, pairs_of, register_loss


@dataclass
class PairwiseOptions:
    loss_type: str = option(
        "sigmoid",
        "sigmoid and logistic: -logsig(s_w - s_l - margin). hinge: relu(margin - (s_w - s_l)).",
        choices=("sigmoid", "logistic", "hinge"),
    )
    margin: float | None = option(None, "Margin of all pairs (default: the column `margin` of the rows, or 0).", ge=0)
    center_rewards_coefficient: float = option(
        0.0, "Weight of (s_w + s_l)^2, which keeps scores near 0, such as 0.01 (arXiv 2312.09244).", ge=0
    )


@register_loss("pairwise", PairwiseOptions)
class Pairwise(PairLoss):
    """``-logsig(s_w - s_l - margin) + c (s_w + s_l)^2`` of the scores of a scalar head; the unit is the pair.

    Bradley-Terry, as in Ouyang et al. 2022 (arXiv 2203.02155, eq. 1); margins as in Llama 2 (arXiv 2307.09288).
    """

    example_type = "preference"

    @property
    def head_labels(self) -> list[str]:
        return ["score"]

    def __call__(self, batch: Batch, models: Models) -> LossOutput:
        scores = models.policy(batch).scores[:, 0]  # [D]
        chosen, rejected = pairs_of(scores, batch).T  # [P], [P]
        margins = self.options.margin
        if margins is None:
            margins = pairs_of(batch.doc_feature("margin"), batch)[:, 0]  # [P]
        difference = chosen - rejected - margins
        losses = F.relu(-difference) if self.options.loss_type == "hinge" else -F.logsigmoid(difference)
        losses = losses + self.options.center_rewards_coefficient * (chosen + rejected) ** 2
        weight = self.num_items(batch)
        with torch.no_grad():
            metrics = {
                "accuracy": ((chosen > rejected).float().sum(), weight),
                "margin": ((chosen - rejected).sum(), weight),
                "score/chosen": (chosen.sum(), weight),
                "score/rejected": (rejected.sum(), weight),
            }
        return LossOutput(losses.sum() + 0 * scores.sum(), weight, metrics)
