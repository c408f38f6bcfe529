"""Preference losses over pairs: direct preference optimization and its variants."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minitrain.batch import Batch
from minitrain.config.schema import option

from .base import LossOutput, Models, PairLoss, pairs_of, register_loss

REFERENCE = option(
    "auto",
    "The reference. model: a second copy of the model. adapter: a snapshot of the trained parameters at step 0. "
    "precomputed: log-probabilities, computed once and cached. auto: adapter with an adapter, else model.",
    choices=("auto", "model", "adapter", "precomputed"),
)


class Pairs(NamedTuple):
    """Log-probabilities and lengths of P pairs, each [P] float32: chosen (w) and rejected (l)."""

    logps_w: Tensor  # log-probability of the response, summed over its tokens
    logps_l: Tensor
    ref_w: Tensor  # the same under the reference; 0 without one
    ref_l: Tensor
    n_w: Tensor  # tokens of the response
    n_l: Tensor

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
        return Pairs(
            self.logps_w / self.n_w, self.logps_l / self.n_l, self.ref_w / self.n_w, self.ref_l / self.n_l, one, one
        )  # fmt: skip


def sigmoid(p: Pairs, o: "DPOOptions") -> Tensor:
    """-(1-e) logsig(beta D) - e logsig(-beta D): DPO (arXiv 2305.18290, eq. 7); with e, conservative DPO."""
    e, d = o.label_smoothing, o.beta * p.delta
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
    """-logsig(beta r_w) - logsig(-beta r_l) (arXiv 2404.04656), without its moving shift."""
    return -F.logsigmoid(o.beta * p.r_w) - F.logsigmoid(-o.beta * p.r_l)


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
    """-logsig(beta D) over token means: length-normalized DPO (arXiv 2411.15124)."""
    return -F.logsigmoid(o.beta * p.delta)


def simpo(p: Pairs, o: "DPOOptions") -> Tensor:
    """-logsig(beta (mean lp_w - mean lp_l) - gamma) (arXiv 2405.14734, eq. 6)."""
    return -F.logsigmoid(o.beta * (p.logps_w - p.logps_l) - o.gamma)


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
              simpo, orpo, cpo)
}  # fmt: skip
WITHOUT_REFERENCE = ("simpo", "orpo", "cpo")
OVER_MEANS = ("ipo", "sigmoid_norm", "simpo", "orpo")  # these compare token means, all others sums


@dataclass
class DPOOptions:
    variant: str = option("sigmoid", "Variant of the loss (see docs/losses.md).", choices=tuple(VARIANTS))
    beta: float | None = option(None, "Strength of the KL constraint (default: 2 for simpo, else 0.1).", gt=0, le=1000)
    label_smoothing: float = option(
        0.0, "sigmoid, robust, exo_pair: assumed fraction of flipped labels.", ge=0, le=0.499
    )
    gamma: float = option(1.0, "simpo: margin.", ge=0, le=1000)
    alpha: float = option(1.0, "cpo: weight of the chosen response's negative log-likelihood.", ge=0)
    ipo_sums: bool = option(False, "ipo: compare sums, as in the DPO authors' code, instead of token means.")
    reference_free: bool = option(False, "Use no reference model: its log-probabilities count as 0.")
    average_log_prob: bool = option(
        False, "Compare token means instead of sums, as ipo, sigmoid_norm, simpo and orpo always do."
    )
    sft_weight: float = option(
        0.0, "Weight of the chosen response's mean negative log-likelihood, added to the loss.", ge=0
    )
    reference: str = REFERENCE

    def __post_init__(self):
        if self.beta is None:
            self.beta = 2.0 if self.variant == "simpo" else 0.1

    @property
    def over_means(self) -> bool:
        """Whether the loss compares token means instead of sums."""
        sums = self.variant not in OVER_MEANS or (self.variant == "ipo" and self.ipo_sums)
        return self.average_log_prob or not sums


@register_loss("dpo", DPOOptions)
class DPO(PairLoss):
    """A function of the log-probabilities of a pair's two responses; the unit is the pair.

    `variant` names a function of this file, whose docstring has the equation. Dropout is off in policy and reference,
    so the first loss of the default variant is ln 2.
    """

    example_type = "preference"
    dropout = False

    def unused_options(self) -> dict[str, str]:
        variant = self.options.variant
        only = {"gamma": ("simpo",), "alpha": ("cpo",), "ipo_sums": ("ipo",)}
        only["label_smoothing"] = ("sigmoid", "robust", "exo_pair")
        unused = {key: f"it needs loss.variant={' or '.join(fit)}." for key, fit in only.items() if variant not in fit}
        if self.options.average_log_prob and "ipo_sums" not in unused:
            unused["ipo_sums"] = "loss.average_log_prob uses means."
        if "reference" not in self.requires:
            unused["reference"] = "simpo, orpo, cpo and reference_free use none."
        return unused

    @property
    def requires(self) -> frozenset[str]:
        free = self.options.reference_free or self.options.variant in WITHOUT_REFERENCE
        return frozenset() if free else frozenset({"reference"})

    def __call__(self, batch: Batch, models: Models) -> LossOutput:
        scores = models.policy(batch)
        sums = scores.per_document(scores.logps)  # [D]
        ref = torch.zeros_like(sums)  # [D]
        if models.reference is not None:
            ref = scores.per_document(models.reference(batch).logps)
        counts = scores.per_document(torch.ones_like(scores.logps))
        columns = [pairs_of(column, batch).T for column in (sums, ref, counts)]  # [2, P] each
        pairs = Pairs(*(side for column in columns for side in column))
        compared = pairs.mean() if self.options.over_means else pairs
        losses = VARIANTS[self.options.variant](compared, self.options)  # [P]
        if self.options.sft_weight:
            losses = losses - self.options.sft_weight * pairs.logps_w / pairs.n_w
        # A sum over no pairs must stay part of the autograd graph.
        return LossOutput(losses.sum() + 0 * sums.sum(), self.num_items(batch), self._metrics(pairs, compared))

    def _metrics(self, pairs: Pairs, compared: Pairs) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the metrics. Rewards are what the loss compares (token means or sums), so they do not favor length."""
        with torch.no_grad():
            weight = pairs.n_w.new_full((), float(len(pairs.n_w)))
            chosen, rejected = self.options.beta * compared.r_w, self.options.beta * compared.r_l
            per_pair = {
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/accuracies": (chosen > rejected).float(),
                "rewards/margins": chosen - rejected,
                "logps/chosen": pairs.logps_w,
                "logps/rejected": pairs.logps_l,
            }
            return {name: (values.sum(), weight) for name, values in per_pair.items()}
