"""Supervised fine-tuning: the cross entropy of the supervised tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minitrain.batch import Batch
from minitrain.config.schema import option

from .base import Loss, LossOutput, Models, register_loss, scalar


class TokenLoss(Loss):
    """A loss whose unit is the supervised token, or its weight if the data has weights."""

    uses_target_weights = True

    def num_items(self, batch: Batch) -> Tensor:
        if (weights := batch.target_weights) is not None:
            return weights.sum()
        return scalar(batch.n_targets, batch)

    def output(self, losses: Tensor, batch: Batch, logps: Tensor, loss_sum: Tensor | None = None) -> LossOutput:
        """Return the output for the losses of the targets, shape [N], with the metrics that every token loss logs.

        Args:
            loss_sum: Their sum without weights of the targets, if the policy has returned it, shape [].
        """
        n, logps = self.num_items(batch), logps.detach()
        values = {"nll": -logps, "avg_p_correct": logps.exp()}
        metrics = {name: (weighted_sum(each, batch), n) for name, each in values.items()}
        is_summed = loss_sum is not None and batch.target_weights is None
        return LossOutput(loss_sum if is_summed else weighted_sum(losses, batch), n, metrics)

    @staticmethod
    def detached(weight_fn: Callable[[Tensor], Tensor], batch: Batch) -> Callable[[Tensor], Tensor] | None:
        """Return the function that lets the LM head compute its gradient at once; None if targets have weights."""
        return weight_fn if batch.target_weights is None else None

    def finalize_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Replace the mean negative log-likelihood by perplexity, its exponential."""
        nll = means.pop("nll")
        return means | {"perplexity": math.exp(nll) if nll < 700 else math.inf}


def weighted_sum(values: Tensor, batch: Batch) -> Tensor:
    """Return the sum of values of the targets, shape [N] -> [], each times its weight."""
    return values.sum() if (weights := batch.target_weights) is None else (weights * values).sum()


@dataclass
class SFTOptions:
    label_smoothing: float = option(0.0, "Weight of the mean negative log-probability over the vocabulary.", ge=0, le=1)
    focal_gamma: float = option(0.0, "Focal loss: gamma in the weight (1 - p)^gamma of each token.", ge=0, le=100)


@register_loss("sft", SFTOptions)
class SFT(TokenLoss):
    """``-log p``; with smoothing e, ``(1 - e)(-log p) + e * mean over the vocabulary of -log p``.

    Label smoothing: Szegedy et al. 2015 (arXiv 1512.00567). Focal loss, ``(1 - p)^gamma (-log p)``,
    where the weight has a gradient, too: Lin et al. 2017 (arXiv 1708.02002).
    """

    def __call__(self, batch: Batch, models: Models) -> LossOutput:
        smoothing, gamma = self.options.label_smoothing, self.options.focal_gamma
        if smoothing == 0 and gamma == 0:
            scores = models.policy(batch, detached_weight_fn=self.detached(torch.ones_like, batch))
            return self.output(-scores.logps, batch, scores.logps, scores.loss_sum)
        scores = models.policy(batch, mean_logps=smoothing > 0)
        losses = -scores.logps  # [N]
        if gamma > 0:
            # 1 - exp(logp) loses all its digits when p is near 1; expm1 keeps them.
            losses = losses * (-torch.expm1(scores.logps)).clamp_min(1e-12).pow(gamma)
        if smoothing > 0:
            losses = (1 - smoothing) * losses - smoothing * scores.mean_logps
        return self.output(losses, batch, scores.logps)
