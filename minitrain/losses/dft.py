"""Dynamic fine-tuning (DFT): cross entropy weighted by the probability of each token."""

from dataclasses import dataclass

from torch import Tensor

from minitrain.batch import Batch
from minitrain.config.schema import option

from .base import LossOutput, Models, register_loss
from .sft import TokenLoss


@dataclass
class DFTOptions:
    dft_alpha: float = option(1.0, "1: the loss of the paper, 0: sft, between: an interpolation.", ge=0, le=1)


@register_loss("dft", DFTOptions)
class DFT(TokenLoss):
    """``-sg(w) log p`` with ``w = alpha p + 1 - alpha``, where sg stops the gradient (arXiv 2508.05629).

    Without sg, the gradient of the target's logit changes sign below p = 1/e. The sum is divided by
    the number of tokens, not by the sum of the weights.
    """

    def token_weights(self, logps: Tensor) -> Tensor:
        """Return w for each token, [N] -> [N], without gradient."""
        alpha = self.options.dft_alpha
        return logps.detach().exp() * alpha + (1 - alpha)

    def __call__(self, batch: Batch, models: Models) -> LossOutput:
        scores = models.policy(batch, detached_weight_fn=self.detached(self.token_weights, batch))
        return self.output(-self.token_weights(scores.logps) * scores.logps, batch, scores.logps, scores.loss_sum)

    def finalize_metrics(self, means: dict[str, float]) -> dict[str, float]:
        return super().finalize_metrics(means) | {"dft_alpha": self.options.dft_alpha}
