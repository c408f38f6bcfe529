"""The surrogate losses of policy gradients: functions of a token's probability ratio and advantage.

All tensors are [N]. rho is the ratio at `importance_sampling_level`, log_ratio that of the token alone.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minitrain.batch import PolicyOutput

from .advantages import MAX_LOG_RATIO, bounded_exp

if TYPE_CHECKING:
    from .policy import PolicyOptions


def surrogate(scores: PolicyOutput, log_ratio: Tensor, rho: Tensor, advantages: Tensor, o: "PolicyOptions") -> Tensor:
    """Return the loss of each token, [N]."""
    if o.loss_aggregation == "cispo":  # arXiv 2506.13585, eq. 4
        return -rho.detach().clamp(max=o.clip_eps_high) * advantages * scores.logps
    if o.loss_aggregation == "sapo":
        return sapo(rho, advantages, o)
    if o.loss_aggregation == "gmpo":
        return gmpo(scores, log_ratio, advantages, o)
    if o.loss_aggregation == "vespo":
        return vespo(scores, log_ratio, advantages, o)
    return clipped(rho, advantages, o)


def clipped(rho: Tensor, advantages: Tensor, o: "PolicyOptions") -> Tensor:
    """Return -min(rho A, clip(rho) A), at most -dual_clip A where A < 0 (arXiv 1912.09729)."""
    losses = torch.maximum(-rho * advantages, -rho.clamp(1 - o.clip_eps_low, 1 + o.clip_eps_high) * advantages)
    if o.dual_clip is None:
        return losses
    return torch.where(advantages < 0, torch.minimum(losses, -o.dual_clip * advantages), losses)


def sapo(rho: Tensor, advantages: Tensor, o: "PolicyOptions") -> Tensor:
    """Return -f(rho) A, f(rho) = 4 / tau sigmoid(tau (rho - 1)), whose slope at rho = 1 is 1 (arXiv 2511.20347)."""

    def gain(tau: float) -> Tensor:
        return 4 / tau * torch.sigmoid(tau * (rho - 1))

    return -torch.where(advantages > 0, gain(o.sapo_temperature_pos), gain(o.sapo_temperature_neg)) * advantages


def gmpo(scores: PolicyOutput, log_ratio: Tensor, advantages: Tensor, o: "PolicyOptions") -> Tensor:
    """Return -A times the geometric mean over a rollout of its ratios, each clipped as in PPO (arXiv 2507.20673)."""
    low, high = math.log(max(1 - o.clip_eps_low, math.exp(-MAX_LOG_RATIO))), math.log(1 + o.clip_eps_high)
    bounded = torch.where(advantages > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=low))
    return -bounded_exp(aggregate_over_rollouts(scores, bounded, "sequence")) * advantages


def vespo(scores: PolicyOutput, log_ratio: Tensor, advantages: Tensor, o: "PolicyOptions") -> Tensor:
    """Return -sg(phi(w)) A log p, phi(w) = w^k exp(lambda (1 - w)), w the ratio of a rollout (arXiv 2602.10693)."""
    log_w = aggregate_over_rollouts(scores, log_ratio.detach(), "product").clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)

    def phi(k: float, decay: float) -> Tensor:
        return bounded_exp(k * log_w + decay * (1 - log_w.exp()))

    good, bad = phi(o.vespo_k_pos, o.vespo_lambda_pos), phi(o.vespo_k_neg, o.vespo_lambda_neg)  # [N], [N]
    return -torch.where(advantages >= 0, good, bad) * advantages * scores.logps


def lengths(scores: PolicyOutput) -> Tensor:
    """Return the number of tokens of each token's rollout -> [N]."""
    return scores.per_document(torch.ones_like(scores.logps))[scores.doc_ids]


def aggregate_over_rollouts(scores: PolicyOutput, log_ratio: Tensor, level: str) -> Tensor:
    """Return the log-ratio of each token at an importance-sampling level, [N] -> [N]."""
    if level == "token":
        return log_ratio
    sums = scores.per_document(log_ratio)[scores.doc_ids]  # [N]
    return sums if level == "product" else sums / lengths(scores)
