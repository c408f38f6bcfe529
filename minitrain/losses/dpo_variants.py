"""The variants of the dpo loss: functions of the log-probabilities of pairs, whose docstrings have the equations."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .dpo import DPOOptions

LARGEST_EXPONENT = 80.0  # exp of more would overflow float32


class Pairs(NamedTuple):
    """Log-probabilities, lengths and weights of P pairs, each [P] float32: chosen (w) and rejected (l)."""

    logps_w: Tensor  # log-probability of the response, summed over its tokens
    logps_l: Tensor
    ref_w: Tensor  # the same under the reference; 0 without one
    ref_l: Tensor
    n_w: Tensor  # tokens of the response
    n_l: Tensor
    weight: Tensor  # of the pair's loss

    @property
    def r_w(self) -> Tensor:
        return self.logps_w - self.ref_w

    @property
    def r_l(self) -> Tensor:
        return self.logps_l - self.ref_l

    @property
    def delta(self) -> Tensor:
        return self.r_w - self.r_l

    def mean(self) -> "Pairs":
        """Return these pairs with means over tokens instead of sums. Calling it twice changes nothing."""
        one = torch.ones_like(self.n_w)  # [P]
        means = self.logps_w / self.n_w, self.logps_l / self.n_l, self.ref_w / self.n_w, self.ref_l / self.n_l
        return Pairs(*means, one, one, self.weight)

    def with_rewards(self, function: Callable[[Tensor], Tensor]) -> "Pairs":
        """Return pairs whose log-ratios r are a function of these."""
        zero = torch.zeros_like(self.ref_w)  # [P]
        return self._replace(logps_w=function(self.r_w), logps_l=function(self.r_l), ref_w=zero, ref_l=zero)


def sigmoid(p: Pairs, o: "DPOOptions") -> Tensor:
    """-(1-e) logsig(beta D) - e logsig(-beta D): DPO (arXiv 2305.18290, eq. 7); with e, conservative DPO."""
    return _smoothed_sigmoid(p.delta, o)


def _smoothed_sigmoid(delta: Tensor, o: "DPOOptions") -> Tensor:
    e, d = o.label_smoothing, o.beta * delta
    return -(1 - e) * F.logsigmoid(d) - e * F.logsigmoid(-d)


def ipo(p: Pairs, o: "DPOOptions") -> Tensor:
    """(D - 1 / (2 beta))^2 over token means, or sums with `ipo_sums` (arXiv 2310.12036, eq. 17)."""
    return (p.delta - 1 / (2 * o.beta)) ** 2


def hinge(p: Pairs, o: "DPOOptions") -> Tensor:
    """relu(1 - beta D): SLiC (arXiv 2309.06657)."""
    return F.relu(1 - o.beta * p.delta)


def robust(p: Pairs, o: "DPOOptions") -> Tensor:
    """[-(1-e) logsig(beta D) + e logsig(-beta D)] / (1 - 2e): unbiased under flipped labels (arXiv 2403.00409)."""
    e, d = o.label_smoothing, o.beta * p.delta
    return (-(1 - e) * F.logsigmoid(d) + e * F.logsigmoid(-d)) / (1 - 2 * e)


def exo_pair(p: Pairs, o: "DPOOptions") -> Tensor:
    """KL of the policy's preference to the smoothed one (arXiv 2402.00856, eq. 16); e = 0 becomes 1e-3."""
    e, d = o.label_smoothing or 1e-3, o.beta * p.delta
    log = torch.log(torch.tensor([1 - e, e], dtype=torch.float64)).tolist()
    return d.sigmoid() * (F.logsigmoid(d) - log[0]) + (-d).sigmoid() * (F.logsigmoid(-d) - log[1])


def nca_pair(p: Pairs, o: "DPOOptions") -> Tensor:
    """-logsig(beta r_w) - 0.5 logsig(-beta r_w) - 0.5 logsig(-beta r_l) (arXiv 2402.05369)."""
    good, bad = o.beta * p.r_w, o.beta * p.r_l
    return -F.logsigmoid(good) - 0.5 * F.logsigmoid(-good) - 0.5 * F.logsigmoid(-bad)


def bco_pair(p: Pairs, o: "DPOOptions") -> Tensor:
    """-logsig(beta r_w - delta) - logsig(delta - beta r_l) (arXiv 2404.04656).

    With `bco_shift`, delta is the mean of beta r_w and beta r_l over the step, without gradient; else it is 0.
    """
    chosen, rejected = o.beta * p.r_w, o.beta * p.r_l
    delta = (chosen + rejected).detach().sum() / max(1, 2 * len(chosen)) if o.bco_shift else 0.0
    return -F.logsigmoid(chosen - delta) - F.logsigmoid(delta - rejected)


def sppo_hard(p: Pairs, o: "DPOOptions") -> Tensor:
    """(r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2 (arXiv 2405.00675)."""
    half = 1 / (2 * o.beta)
    return (p.r_w - half) ** 2 + (p.r_l + half) ** 2


def apo_zero(p: Pairs, o: "DPOOptions") -> Tensor:
    """1 - sig(beta r_w) + sig(beta r_l): for chosen responses better than the policy's (arXiv 2408.06266)."""
    return 1 - (o.beta * p.r_w).sigmoid() + (o.beta * p.r_l).sigmoid()


def apo_down(p: Pairs, o: "DPOOptions") -> Tensor:
    """sig(beta r_w) + 1 - sig(beta D): for chosen responses worse than the policy's (arXiv 2408.06266)."""
    return (o.beta * p.r_w).sigmoid() + 1 - (o.beta * p.delta).sigmoid()


def sigmoid_norm(p: Pairs, o: "DPOOptions") -> Tensor:
    """-logsig(beta D) over token means: length-normalized DPO (arXiv 2411.15124, where beta is 5)."""
    return -F.logsigmoid(o.beta * p.delta)


def simpo(p: Pairs, o: "DPOOptions") -> Tensor:
    """-logsig(beta (mean lp_w - mean lp_l) - gamma) (arXiv 2405.14734, eq. 6)."""
    return -F.logsigmoid(o.beta * (p.logps_w - p.logps_l) - o.gamma)


def alphapo(p: Pairs, o: "DPOOptions") -> Tensor:
    """-logsig(beta (R_w - R_l) - gamma), R = (1 - exp(-a mean lp)) / a (arXiv 2501.03884)."""
    return simpo(p, o)  # `_compare` has replaced the means by R


def discopop(p: Pairs, o: "DPOOptions") -> Tensor:
    """-(1 - m) logsig(beta D) + m exp(-beta D), m = sig(beta D / tau) (arXiv 2406.08414, eq. 5)."""
    d = o.beta * p.delta
    # m exp(-d) in one exponential, because exp(-d) alone overflows where m is 0.
    return -(-d / o.discopop_tau).sigmoid() * F.logsigmoid(d) + (F.logsigmoid(d / o.discopop_tau) - d).exp()


def aot(p: Pairs, o: "DPOOptions") -> Tensor:
    """The loss of `sigmoid`, D = k-th smallest lp_w - lp_l minus that of the reference (arXiv 2406.05882)."""
    ratios, ref_ratios = p.logps_w - p.logps_l, p.ref_w - p.ref_l
    return _smoothed_sigmoid(ratios.sort().values - ref_ratios.sort().values, o)


def aot_unpaired(p: Pairs, o: "DPOOptions") -> Tensor:
    """The loss of `sigmoid`, D = k-th smallest r_w minus k-th smallest r_l (arXiv 2406.05882)."""
    return _smoothed_sigmoid(p.r_w.sort().values - p.r_l.sort().values, o)


def orpo(p: Pairs, o: "DPOOptions") -> Tensor:
    """NLL_w - beta logsig(log odds ratio), all over token means (arXiv 2403.07691, eq. 6-7)."""
    log_odds = p.logps_w - p.logps_l - (_log1mexp(p.logps_w) - _log1mexp(p.logps_l))
    return -p.logps_w - o.beta * F.logsigmoid(log_odds)


def cpo(p: Pairs, o: "DPOOptions") -> Tensor:
    """-logsig(beta (lp_w - lp_l)) + alpha NLL_w, the NLL a token mean (arXiv 2401.08417)."""
    return -F.logsigmoid(o.beta * (p.logps_w - p.logps_l)) - o.alpha * p.mean().logps_w


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x < 0, accurate at both ends."""
    x = x.clamp(max=-1e-7)
    return torch.where(x > -0.693, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


VARIANTS: dict[str, Callable[[Pairs, "DPOOptions"], Tensor]] = {
    f.__name__: f
    for f in (sigmoid, ipo, hinge, robust, exo_pair, nca_pair, bco_pair, sppo_hard, apo_zero, apo_down, sigmoid_norm,
              simpo, alphapo, orpo, cpo, discopop, aot, aot_unpaired)
}  # fmt: skip
WITHOUT_REFERENCE = ("simpo", "alphapo", "orpo", "cpo")
OVER_MEANS = ("ipo", "sigmoid_norm", "simpo", "alphapo", "orpo")  # these compare token means, all others sums
SORTED = ("aot", "aot_unpaired")
OF_DIFFERENCES = ("sigmoid", "ipo", "hinge", "robust", "exo_pair", "discopop")  # f-divergences are defined for these
SMOOTHED = ("sigmoid", "robust", "exo_pair", *SORTED)
OF_VARIANTS = {  # options of some variants
    "label_smoothing": SMOOTHED,
    "gamma": ("simpo", "alphapo"),
    "alpha": ("cpo",),
    "alphapo_alpha": ("alphapo",),
    "discopop_tau": ("discopop",),
    "bco_shift": ("bco_pair",),
    "ipo_sums": ("ipo",),
}
DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {  # r and f_alpha -> f'(exp(r)) up to a constant
    "forward_kl": lambda r, a: -torch.expm1((-r).clamp(max=LARGEST_EXPONENT)),
    "js": lambda r, a: math.log(2) + F.logsigmoid(r),
    "alpha": lambda r, a: -torch.expm1((-a * r).clamp(max=LARGEST_EXPONENT)) / a,
}
