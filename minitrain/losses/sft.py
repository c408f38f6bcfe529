"""Supervised fine-tuning: the cross entropy of the supervised tokens."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minitrain.batch import Batch
from minitrain.config.schema import option

from .base import Loss, LossOutput, Models, register_loss


class TokenLoss(Loss):
    """A loss whose unit is the supervised token."""

    def num_items(self, batch: Batch) -> Tensor:
        return torch.tensor(float(batch.n_targets), device=batch.targets.device)

    def output(self, loss: Tensor, batch: Batch, logps: Tensor) -> LossOutput:
        """Return the output for a summed loss, with the metrics that every token loss logs."""
        weight, logps = self.num_items(batch), logps.detach()
        metrics = {"nll": (-logps.sum(), weight), "avg_p_correct": (logps.exp().sum(), weight)}
        return LossOutput(loss, weight, metrics)

    def finalize_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Replace the mean negative log-likelihood by perplexity, its exponential."""
        nll = means.pop("nll")
        return means | {"perplexity": math.exp(nll) if nll < 700 else math.inf}


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
            scores = models.policy(batch, detached_weight_fn=torch.ones_like)
            return self.output(-scores.logps.sum(), batch, scores.logps)
        scores = models.policy(batch, mean_logps=smoothing > 0)
        losses = -scores.logps  # [N]
        if gamma > 0:
            # 1 - exp(logp) loses all its digits when p is near 1; expm1 keeps them.
            losses = losses * (-torch.expm1(scores.logps)).clamp_min(1e-12).pow(gamma)
        if smoothing > 0:
            losses = (1 - smoothing) * losses - smoothing * scores.mean_logps
        return self.output(losses.sum(), batch, scores.logps)
