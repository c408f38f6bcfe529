"""Preference losses over pairs: direct preference optimization and its variants."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minitrain.batch import Batch
from minitrain.config.schema import option

from .base import LossOutput, Models, PairLoss, pairs_of, register_loss
from .dpo_variants import (
    DIVERGENCES,
    OF_DIFFERENCES,
    OF_VARIANTS,
    OVER_MEANS,
    SORTED,
    VARIANTS,
    WITHOUT_REFERENCE,
    Pairs,
)
from .full_step import FullStepLoss, RowLosses

REFERENCE = option(
    "auto",
    "The reference. model: a second copy of the model. adapter: a snapshot of the trained parameters at step 0. "
    "precomputed: log-probabilities, computed once and cached. auto: adapter with an adapter, else model.",
    choices=("auto", "model", "adapter", "precomputed"),
)
SYNC_STEPS = option(
    0,
    "Updates after which the reference moves towards the policy (TR-DPO, arXiv 2404.09656), such as 512. 0: never.",
    ge=0,
)
MIXUP = option(0.6, "Weight of the policy when the reference moves; 1 replaces the reference.", gt=0, le=1)


@dataclass
class DPOOptions:
    variant: str = option("sigmoid", "Variant of the loss (see docs/losses.md).", choices=tuple(VARIANTS))
    variant_weights: dict[str, float] = option(
        {}, "Weights of several variants, whose sum replaces `variant`, as {sigmoid: 0.8, bco_pair: 0.2}."
    )
    beta: float | None = option(
        None,
        "Strength of the KL constraint (default: 2 for simpo and alphapo, else 0.1). Tulu 3 uses 5 for sigmoid_norm, "
        "whose token means hardly train with 0.1.",
        gt=0,
        le=1000,
    )
    label_smoothing: float = option(
        0.0, "sigmoid, robust, exo_pair, aot, aot_unpaired: assumed fraction of flipped labels.", ge=0, le=0.499
    )
    gamma: float = option(1.0, "simpo, alphapo: margin.", ge=0, le=1000)
    alpha: float = option(1.0, "cpo: weight of the chosen response's negative log-likelihood.", ge=0)
    alphapo_alpha: float = option(0.25, "alphapo: exponent of the reward; towards 0, the loss is simpo.", ge=-10, le=10)
    discopop_tau: float = option(0.05, "discopop: temperature of the mixture.", ge=1e-3, le=1)
    bco_shift: bool = option(False, "bco_pair: subtract the mean reward of the step from all rewards.")
    ipo_sums: bool = option(False, "ipo: compare sums, as in the DPO authors' code, instead of token means.")
    reference_free: bool = option(False, "Use no reference model: its log-probabilities count as 0.")
    average_log_prob: bool = option(
        False, "Compare token means instead of sums, as ipo, sigmoid_norm, simpo and orpo always do."
    )
    sft_weight: float = option(
        0.0, "Weight of the chosen response's mean negative log-likelihood, added to the loss.", ge=0
    )
    f_divergence: str = option(
        "reverse_kl",
        "Divergence from the reference that the loss penalizes, for variants of a difference of sums.",
        choices=("reverse_kl", *DIVERGENCES),
    )
    f_alpha: float = option(0.5, "f_divergence=alpha: 0 would be reverse_kl, and 1 forward_kl.", gt=0, lt=1)
    ld_alpha: float | None = option(
        None,
        "LD-DPO: weight of the tokens of a response beyond the length of the shorter one (default: 1).",
        ge=0,
        le=1,
    )
    wpo: bool = option(False, "WPO: multiply a pair's loss by how likely the policy samples its responses, at most 1.")
    reference: str = REFERENCE
    reference_sync_steps: int = SYNC_STEPS
    reference_mixup: float = MIXUP

    def __post_init__(self):
        if self.beta is None:
            self.beta = 2.0 if set(self.weights) <= {"simpo", "alphapo"} else 0.1

    @property
    def weights(self) -> dict[str, float]:
        """The variants and their weights."""
        return self.variant_weights or {self.variant: 1.0}

    def over_means(self, variants: Iterable[str]) -> bool:
        """Return whether all variants compare token means instead of sums."""
        means = [name for name in OVER_MEANS if not (name == "ipo" and self.ipo_sums)]
        return self.average_log_prob or set(variants) <= set(means)


@register_loss("dpo", DPOOptions)
class DPO(FullStepLoss, PairLoss):
    """A function of the log-probabilities of a pair's two responses; the unit is the pair.

    `variant` names a function of `dpo_variants.py`, whose docstring has the equation. Dropout is off in policy and
    reference, so the first loss of the default variant is ln 2.
    """

    example_type = "preference"
    full_lr = 1e-6
    dropout = False

    def unused_options(self) -> dict[str, str]:
        o = self.options
        unused = {
            key: f"it needs loss.variant={' or '.join(fit)}."
            for key, fit in OF_VARIANTS.items()
            if not set(fit) & set(o.weights)
        }
        if o.variant_weights:
            unused["variant"] = "loss.variant_weights replaces it."
        if o.average_log_prob and "ipo_sums" not in unused:
            unused["ipo_sums"] = "loss.average_log_prob uses means."
        if o.f_divergence != "alpha":
            unused["f_alpha"] = "it needs loss.f_divergence=alpha."
        if not o.reference_sync_steps:
            unused["reference_mixup"] = "it needs loss.reference_sync_steps."
        if "reference" not in self.requires:
            reason = "simpo, alphapo, orpo, cpo and reference_free use none."
            unused |= dict.fromkeys(("reference", "reference_sync_steps", "reference_mixup", "f_divergence"), reason)
        return unused

    def conflicts(self) -> dict[str, str]:
        o, names, found = self.options, set(self.options.weights), sync_conflicts(self.options)
        if unknown := [name for name in o.variant_weights if name not in VARIANTS]:
            found["variant_weights"] = f"unknown variant {unknown[0]!r}. Use {', '.join(VARIANTS)}."
            return found
        if o.variant_weights and not all(0 < weight <= 1e6 for weight in o.variant_weights.values()):
            found["variant_weights"] = "must be above 0 and at most 1e6 for every variant."
        if o.alphapo_alpha == 0:
            found["alphapo_alpha"] = "must not be 0, where alphapo is simpo. Set loss.variant=simpo."
        compares_means = [name for name in o.weights if o.over_means([name])]
        if o.f_divergence != "reverse_kl" and (compares_means or not names <= set(OF_DIFFERENCES)):
            wrong = (compares_means or sorted(names - set(OF_DIFFERENCES)))[0]
            found["f_divergence"] = f"conflicts with {wrong}, which is not a function of a difference of sums. Use " + (
                f"{', '.join(OF_DIFFERENCES)} (ipo with ipo_sums=true)."
            )
        if o.ld_alpha is not None and compares_means:
            found["ld_alpha"] = (
                f"conflicts with {compares_means[0]} of token means, which lengths do not affect. Remove it."
            )
        if o.wpo and (of_step := sorted(names & set(SORTED))):
            found["wpo"] = f"conflicts with {of_step[0]}, whose losses are not those of pairs. Remove one of them."
        return found

    @property
    def requires(self) -> frozenset[str]:
        free = self.options.reference_free or set(self.options.weights) <= set(WITHOUT_REFERENCE)
        return frozenset() if free else frozenset({"reference"})

    @property
    def gathers_rows(self) -> bool:
        """Whether a pair's loss depends on the other pairs of the step."""
        return self.options.bco_shift or bool(set(SORTED) & set(self.options.weights))

    def step_rows(self, batch: Batch, models: Models) -> tuple[Tensor, Tensor]:
        pairs = self._pairs(batch, models)[0]
        return torch.stack(pairs, 1), pairs.weight.detach()[:, None]  # [P, 7], [P, 1] unused

    def row_losses(self, rows: Tensor, numbers: Tensor) -> RowLosses:
        return RowLosses(self._losses(Pairs(*rows.unbind(1))))

    def __call__(self, batch: Batch, models: Models) -> LossOutput:
        pairs, logps = self._pairs(batch, models)
        losses = (
            self.losses_of(torch.stack(pairs, 1), pairs.weight).losses if self.gathers_rows else self._losses(pairs)
        )  # [P]
        compared = self._compare(pairs, self.options.weights)
        # A sum over no pairs must stay part of the autograd graph.
        return LossOutput(losses.sum() + 0 * logps.sum(), self.num_items(batch), self._metrics(pairs, compared))

    def _pairs(self, batch: Batch, models: Models) -> tuple[Pairs, Tensor]:
        """Return the pairs, and the log-probabilities of the targets, shape [N]."""
        o = self.options
        scores = models.policy(batch, log_sum_squares=True) if o.wpo else models.policy(batch)
        counts = scores.per_document(torch.ones_like(scores.logps))  # [D]
        lengths = 1.0 if o.ld_alpha is None else _length_weights(scores.doc_ids, counts, o.ld_alpha)  # [N]
        sums = scores.per_document(lengths * scores.logps)  # [D]
        ref = torch.zeros_like(sums)  # [D]
        if models.reference is not None:
            ref = scores.per_document(lengths * models.reference(batch).logps)
        columns = [pairs_of(column, batch).T for column in (sums, ref, counts)]  # [2, P] each
        weight = torch.ones_like(columns[0][0])  # [P]
        if o.wpo:
            aligned = scores.per_document(scores.logps.detach() - scores.log_sum_squares)  # [D]
            weight = pairs_of(aligned / counts, batch).sum(1).clamp(max=0).exp()
        return Pairs(*(side for column in columns for side in column), weight), scores.logps

    def _losses(self, pairs: Pairs) -> Tensor:
        """Return the losses of pairs, shape [P]."""
        o = self.options
        losses = sum(weight * VARIANTS[name](self._compare(pairs, [name]), o) for name, weight in o.weights.items())
        if o.sft_weight:
            losses = losses - o.sft_weight * pairs.logps_w / pairs.n_w
        return losses * pairs.weight

    def _compare(self, pairs: Pairs, variants: Iterable[str]) -> Pairs:
        """Return what all these variants compare: sums or token means, or a function of them."""
        o = self.options
        compared = pairs.mean() if o.over_means(variants) else pairs
        if set(variants) == {"alphapo"}:
            return compared.with_rewards(lambda mean: DIVERGENCES["alpha"](mean, o.alphapo_alpha))
        if o.f_divergence != "reverse_kl":
            return compared.with_rewards(lambda r: DIVERGENCES[o.f_divergence](r, o.f_alpha))
        return compared

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
            if self.options.wpo:
                per_pair["wpo_weight"] = pairs.weight
            return {name: (values.sum(), weight) for name, values in per_pair.items()}


def sync_conflicts(options: Any) -> dict[str, str]:
    """Return the conflict of a reference that cannot move with `reference_sync_steps`, if there is one."""
    if options.reference_sync_steps == 0 or options.reference in ("auto", "adapter"):
        return {}
    return {"reference_sync_steps": f"conflicts with loss.reference={options.reference}, which cannot move. Use auto."}


def _length_weights(doc_ids: Tensor, counts: Tensor, alpha: float) -> Tensor:
    """Return 1 for the targets up to the length of the shorter response of the pair, then alpha, shape [N].

    Args:
        doc_ids: Document of each target, ascending, shape [N].
        counts: Targets of each document, shape [D].
    """
    shorter = counts.view(-1, 2).amin(1).repeat_interleave(2)  # [D]
    within = torch.arange(len(doc_ids), device=doc_ids.device) - (counts.cumsum(0) - counts)[doc_ids]  # [N]
    return torch.where(within < shorter[doc_ids], 1.0, alpha)
