"""Kahneman-Tversky optimization and its variants: desirable and undesirable responses, without pairs."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minitrain.batch import Batch, to_device
from minitrain.config.schema import option

from .base import LossOutput, Models, PairLoss, pairs_of, register_loss, scalar
from .dpo import MIXUP, REFERENCE, SYNC_STEPS, sync_conflicts


@dataclass
class KTOOptions:
    variant: str = option(
        "kto", "Variant of the loss (see docs/losses.md).", choices=("kto", "apo_zero_unpaired", "bco")
    )
    beta: float = option(0.1, "Strength of the KL constraint.", gt=0, le=1000)
    desirable_weight: float = option(1.0, "lambda_D, the weight of desirable responses.", ge=0)
    undesirable_weight: float = option(1.0, "lambda_U, the weight of undesirable responses.", ge=0)
    reference: str = REFERENCE
    reference_sync_steps: int = SYNC_STEPS
    reference_mixup: float = MIXUP


@register_loss("kto", KTOOptions)
class KTO(PairLoss):
    """Functions of s = r - z, lambda_D f(s) of desirable responses and lambda_U f(-s) of undesirable ones.

    kto: f(s) = 1 - sig(beta s). z is the mean log-ratio of policy to reference over responses to other prompts of the
    full optimizer step, at least 0, without gradient (arXiv 2402.01306, eq. 8).
    apo_zero_unpaired: the same f with z = 0 (arXiv 2408.06266).
    bco: f(s) = -logsig(beta s). z is half the sum of the mean r of the desirable and of the undesirable responses of
    the step, without gradient (arXiv 2404.04656).

    The unit is the labeled response. For kto, each example is two documents: the labeled response, and the same prompt
    with a response to another prompt, from which z is estimated.
    """

    example_type = "unpaired_preference"
    full_lr = 1e-6
    dropout = False

    def __init__(self, options: KTOOptions):
        super().__init__(options)
        self.z = torch.zeros(())

    @property
    def has_step_statistics(self) -> bool:
        """Whether z depends on the full step."""
        return self.options.variant != "apo_zero_unpaired"

    @property
    def uses_partners(self) -> bool:
        """Whether each example has a response to another prompt; sampled ones always do."""
        return self.options.variant == "kto" or self.online

    def num_items(self, batch: Batch) -> Tensor:
        return super().num_items(batch) if self.uses_partners else scalar(batch.docs_with_targets.sum(), batch)

    def unused_options(self) -> dict[str, str]:
        is_fixed = not self.options.reference_sync_steps
        return {"reference_mixup": "it needs loss.reference_sync_steps."} if is_fixed else {}

    def conflicts(self) -> dict[str, str]:
        is_constant = self.options.desirable_weight == self.options.undesirable_weight == 0
        reason = "is 0, and so is loss.undesirable_weight, so the loss is always 0. Set one of them above 0."
        return sync_conflicts(self.options) | ({"desirable_weight": reason} if is_constant else {})

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"reference"})

    def step_statistics(self, batch: Batch, models: Models) -> Tensor:
        ratios = _log_ratios(batch, models)  # [D]
        if self.options.variant == "kto":
            ratios = pairs_of(ratios, batch)[:, 1]  # [P]
            groups = [torch.ones_like(ratios)]
        else:
            ratios, desirable = self._labeled(ratios, batch), self._labeled(batch.doc_feature("desirable"), batch)
            groups = [desirable, 1 - desirable]  # [P] each
        return torch.stack([torch.stack([(ratios * group).sum(), group.sum()]) for group in groups])  # [1 or 2, 2]

    def set_step_statistics(self, statistics: Tensor) -> None:
        totals, counts = statistics.detach().T  # [1 or 2] each
        z = (totals / counts.clamp_min(1)).sum() / (counts > 0).sum().clamp_min(1)  # []
        self.z = z.clamp_min(0) if self.options.variant == "kto" else z

    def __call__(self, batch: Batch, models: Models) -> LossOutput:
        ratios = _log_ratios(batch, models)  # [D]
        r = self._labeled(ratios, batch)  # [P]
        desirable = self._labeled(batch.doc_feature("desirable"), batch) > 0.5  # [P]
        gain = self.options.beta * (r - self.z) * torch.where(desirable, 1.0, -1.0)
        weights = torch.where(desirable, self.options.desirable_weight, self.options.undesirable_weight)  # [P]
        losses = weights * (-F.logsigmoid(gain) if self.options.variant == "bco" else 1 - gain.sigmoid())
        return LossOutput(losses.sum() + 0 * ratios.sum(), self.num_items(batch), self._metrics(r, desirable))

    def _labeled(self, values: Tensor, batch: Batch) -> Tensor:
        """Return values of the documents [D] at the labeled responses that have targets, shape [P]."""
        if self.uses_partners:
            return pairs_of(values, batch)[:, 0]
        return values.index_select(0, to_device(batch.docs_with_targets.nonzero()[:, 0], values.device))

    def _metrics(self, r: Tensor, desirable: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        with torch.no_grad():
            rewards, yes, no = self.options.beta * r, desirable.float(), (~desirable).float()
            z = self.z * len(r), yes.new_full((), float(len(r)))
            return {
                "rewards/chosen": ((rewards * yes).sum(), yes.sum()),
                "rewards/rejected": ((rewards * no).sum(), no.sum()),
                **({"kl": z} if self.options.variant == "kto" else {}),
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
