"""Kahneman-Tversky optimization: desirable and undesirable responses, without pairs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minitrain.batch import Batch
from minitrain.config.schema import option

from .base import LossOutput, Models, PairLoss, pairs_of, register_loss
from .dpo import REFERENCE


@dataclass
class KTOOptions:
    beta: float = option(0.1, "Strength of the KL constraint.", gt=0, le=1000)
    desirable_weight: float = option(1.0, "lambda_D, the weight of desirable responses.", ge=0)
    undesirable_weight: float = option(1.0, "lambda_U, the weight of undesirable responses.", ge=0)
    reference: str = REFERENCE


@register_loss("kto", KTOOptions)
class KTO(PairLoss):
    """lambda_D (1 - sig(beta (r - z))) of desirable responses, lambda_U (1 - sig(beta (z - r))) of undesirable ones.

    z is the mean log-ratio of policy to reference over responses to other prompts of the full optimizer step, at least
    0, without gradient (arXiv 2402.01306, eq. 8). The unit is the labeled response. Each example is two documents: the
    labeled response, and the same prompt with a response to another prompt, which only z is estimated from.
    """

    example_type = "unpaired_preference"
    dropout = False
    has_step_statistics = True

    def __init__(self, options: KTOOptions):
        super().__init__(options)
        self.z = torch.zeros(())

    def conflicts(self) -> dict[str, str]:
        is_constant = self.options.desirable_weight == self.options.undesirable_weight == 0
        reason = "is 0, and so is loss.undesirable_weight, so the loss is always 0. Set one of them above 0."
        return {"desirable_weight": reason} if is_constant else {}

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"reference"})

    def step_statistics(self, batch: Batch, models: Models) -> Tensor:
        ratios = pairs_of(_log_ratios(batch, models), batch)[:, 1]  # [P]
        return torch.stack([ratios.sum(), ratios.new_full((), float(len(ratios)))])  # [2]

    def set_step_statistics(self, statistics: Tensor) -> None:
        total, count = statistics.detach()
        self.z = (total / count.clamp_min(1)).clamp_min(0)  # []

    def __call__(self, batch: Batch, models: Models) -> LossOutput:
        ratios = _log_ratios(batch, models)  # [D]
        r = pairs_of(ratios, batch)[:, 0]  # [P]
        desirable = pairs_of(batch.doc_feature("desirable"), batch)[:, 0] > 0.5  # [P]
        gain = self.options.beta * (r - self.z)
        losses = torch.where(
            desirable,
            self.options.desirable_weight * (1 - gain.sigmoid()),
            self.options.undesirable_weight * (1 - (-gain).sigmoid()),
        )
        return LossOutput(losses.sum() + 0 * ratios.sum(), self.num_items(batch), self._metrics(r, desirable))

    def _metrics(self, r: Tensor, desirable: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        with torch.no_grad():
            rewards, yes, no = self.options.beta * r, desirable.float(), (~desirable).float()
            return {
                "rewards/chosen": ((rewards * yes).sum(), yes.sum()),
                "rewards/rejected": ((rewards * no).sum(), no.sum()),
                "kl": (self.z * len(r), yes.new_full((), float(len(r)))),
            }

    def finalize_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Add the margin if a step has desirable and undesirable responses."""
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means = means | {"rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]}
        return means


def _log_ratios(batch: Batch, models: Models) -> Tensor:
    """Return log(policy / reference) of each document's response -> [D]."""
    output = models.policy(batch)
    return output.per_document(output.logps - models.reference(batch).logps)
