"""Policy gradients over rollouts read from a file: PPO, GRPO and their kin."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minitrain.batch import Batch, PolicyOutput
from minitrain.config.schema import option
from minitrain.errors import DataError

from .advantages import (
    ADVANTAGES,
    DISCOUNTED,
    ESTIMATORS,
    MAX_LOG_RATIO,
    Rollouts,
    apart,
    bounded_exp,
    common_columns,
    estimate,
    kl_estimate,
    penalised_rewards,
    whiten,
)
from .base import AddedFeatures, DataFile, Loss, LossOutput, Models, register_loss
from .dpo import REFERENCE
from .value import EPS_VALUE, GAE_LAMBDA, GAMMA, value_losses, value_metrics, with_explained_variance

EPS_HIGH = {"dapo": 0.28, "cispo": 5.0}  # as their papers have it, or their users


@dataclass
class PolicyOptions:
    advantage_estimator: str = option(
        "grpo",
        "How good a token was (see docs/losses.md). given: the rows' own `advantages`.",
        choices=ADVANTAGES,
        alias="advantages",
    )
    gamma: float = GAMMA
    gae_lambda: float = GAE_LAMBDA
    scale_rewards: bool = option(True, "grpo: divide by the deviation of the group's rewards.")
    whiten: bool | None = option(
        None, "Advantages of mean 0 and deviation 1 over all tokens of the files; on with gae and reinforce++."
    )
    loss_aggregation: str = option(
        "dapo",
        "What a step's sum is divided by; cispo also changes the term.",
        choices=("dapo", "grpo", "dr_grpo", "cispo"),
        alias=("loss_type", "normaliser"),
    )
    max_new_tokens: int | None = option(
        None, "dr_grpo: tokens that an answer could have had; the longest of the training files when left out.", ge=1
    )
    importance_sampling_level: str = option(
        "token",
        "token: of each token. sequence: the geometric mean over a response's tokens (GSPO). product: that of the "
        "whole response (RLOO).",
        choices=("token", "sequence", "product"),
        alias="ratio",
    )
    clip_eps_low: float = option(
        0.2, "The ratio is clipped below 1 - clip_eps_low.", ge=0, le=1, alias=("epsilon", "eps_low")
    )
    clip_eps_high: float | None = option(
        None,
        "And above 1 + clip_eps_high; with cispo, at clip_eps_high. Default: 0.28 with dapo, 5 with cispo, else "
        "clip_eps_low.",
        gt=0,
        alias=("epsilon_high", "eps_high"),
    )
    dual_clip: float | None = option(None, "The ratio counts at most so much where the advantage is negative.", gt=1)
    temperature: float = option(
        1.0, "The one that answers were sampled at; old_logps are those at it.", ge=0.01, le=100
    )
    entropy_coef: float = option(0.0, "Weight of the entropy, which is to stay high.", ge=0)
    kl_coef: float = option(0.0, "Weight of the KL to the reference.", ge=0)
    kl_in: str = option(
        "auto",
        "The KL is a term of the loss, or lessens the rewards. auto: reward with gae and reinforce++, else loss.",
        choices=("auto", "loss", "reward"),
    )
    kl_estimator: str | None = option(
        None, "k1, k2 or k3 (see docs/losses.md); when left out k3 in the loss, k1 in the rewards.", choices=ESTIMATORS
    )
    kl_times_ratio: bool = option(
        False, "Multiply the KL in the loss by the ratio: its gradient is then that of KL(policy || reference)."
    )
    reference: str = REFERENCE
    vf_coef: float = option(
        0.0, "Weight of the loss of a value head beside the vocabulary, 0.1 for instance; 0: there is none.", ge=0
    )
    eps_value: float = EPS_VALUE

    def __post_init__(self):
        if self.kl_in == "auto":
            self.kl_in = "reward" if self.advantage_estimator in DISCOUNTED else "loss"
        if self.kl_estimator is None:
            self.kl_estimator = "k1" if self.kl_in == "reward" else "k3"
        if self.clip_eps_high is None:
            self.clip_eps_high = EPS_HIGH.get(self.loss_aggregation, self.clip_eps_low)
        if self.whiten is None:
            self.whiten = self.advantage_estimator in DISCOUNTED


@register_loss("policy", PolicyOptions)
class PolicyLoss(Loss):
    """-min(rho A, clip(rho, 1 - eps_l, 1 + eps_h) A) of each token, rho = p / p_old (arXiv 1707.06347, eq. 7).

    With dapo (arXiv 2503.14476) and cispo (arXiv 2506.13585) the unit is the token; with grpo (arXiv 2402.03300) it is
    the rollout, of which the mean over its tokens is taken; with dr_grpo (arXiv 2503.20783) it is a place of the
    longest rollout there could be. Terms of KL, entropy and value are summed in the same way. Rollouts without
    old_logps are taken to be the policy's own: rho is 1, and the gradient that of -A log p.
    """

    example_type = "rollout"
    dropout = False

    def __init__(self, options: PolicyOptions):
        super().__init__(options)
        self.max_new_tokens = options.max_new_tokens

    def unused_options(self) -> dict[str, str]:
        o, told = self.options, {}
        if o.advantage_estimator not in DISCOUNTED and (o.advantage_estimator == "given" or not o.vf_coef):
            told["gamma"] = "it needs loss.advantage_estimator=gae or reinforce++, or returns for loss.vf_coef."
        if o.advantage_estimator != "gae":
            told["gae_lambda"] = "it needs loss.advantage_estimator=gae."
        if o.advantage_estimator != "grpo":
            told["scale_rewards"] = "it needs loss.advantage_estimator=grpo."
        if o.loss_aggregation != "dr_grpo":
            told["max_new_tokens"] = "it needs loss.loss_aggregation=dr_grpo."
        if o.loss_aggregation == "cispo":
            told |= dict.fromkeys(("clip_eps_low", "dual_clip"), "cispo clips at clip_eps_high alone.")
        if not o.kl_coef:
            told |= dict.fromkeys(("kl_in", "kl_estimator", "kl_times_ratio", "reference"), "it needs loss.kl_coef.")
        elif o.kl_in == "reward":
            told["reference"] = "the KL is in the rewards, which needs old_logps and ref_logps in the rows."
            told["kl_times_ratio"] = "it needs loss.kl_in=loss."
            if o.advantage_estimator == "given":
                told["kl_in"] = "advantages that are given come from no rewards."
        if not o.vf_coef:
            told["eps_value"] = "it needs loss.vf_coef."
        return told

    def conflicts(self) -> dict[str, str]:
        o = self.options
        if o.kl_coef and o.kl_in == "loss" and o.kl_estimator == "k1" and not o.kl_times_ratio:
            reason = "the gradient of k1 in the loss is 0 in expectation. Use k2 or k3, loss.kl_times_ratio=true, or "
            return {"kl_estimator": reason + "loss.kl_in=reward."}
        return {}

    @property
    def requires(self) -> frozenset[str]:
        compares = self.options.kl_coef > 0 and self.options.kl_in == "loss"
        return frozenset({"reference"} if compares else ()) | frozenset({"values"} if self.options.vf_coef else ())

    @property
    def temperature(self) -> float:
        return self.options.temperature

    def on_data_loaded(self, train: Sequence[DataFile], eval: Sequence[DataFile]) -> list[AddedFeatures]:
        """Return the columns `advantages` and, for a value head, `returns`."""
        common_columns([*train, *eval])
        learned, kind = Rollouts(train), self.options.advantage_estimator
        self.max_new_tokens = self.options.max_new_tokens or int(learned.lengths.max())
        if kind in ("grpo", "rloo") and int(learned.groups().bincount().max()) < 2:
            raise DataError(
                f"{train[0].source}: no prompt has two rollouts, so none can be compared with another as "
                f"loss.advantage_estimator={kind} does. Sample several of each prompt, or take "
                "loss.advantage_estimator=reinforce++.",
                "unsuitable-data",
            )
        return [added for files in apart(train, eval) for added in self._advantages(Rollouts(files))]

    def _advantages(self, rollouts: Rollouts) -> list[AddedFeatures]:
        o = self.options
        if o.advantage_estimator == "given":
            advantages = rollouts.column("advantages", "loss.advantage_estimator=given")
            returns = rollouts.column("returns", "loss.vf_coef with advantages that are given") if o.vf_coef else None
        else:
            rewards = penalised_rewards(rollouts, o.kl_coef if o.kl_in == "reward" else 0.0, o.kl_estimator)
            advantages, returns = estimate(
                rollouts, rewards, o.advantage_estimator, o.gamma, o.gae_lambda, o.scale_rewards
            )
        columns = {"advantages": whiten(advantages) if o.whiten else advantages}
        return rollouts.as_features(**columns, **({"returns": returns} if o.vf_coef else {}))

    def num_items(self, batch: Batch) -> Tensor:
        if self.options.loss_aggregation in ("dapo", "cispo"):
            return torch.tensor(float(batch.n_targets), device=batch.targets.device)
        rollouts = batch.docs_with_targets.sum().float()
        return rollouts * self.max_new_tokens if self.options.loss_aggregation == "dr_grpo" else rollouts

    def __call__(self, batch: Batch, models: Models) -> LossOutput:
        o = self.options
        scores = models.policy(batch, entropy=True, temperature=o.temperature)
        advantages = batch.target_feature("advantages")  # [N]
        old = batch.target_feature("old_logps") if "old_logps" in batch.token_features else scores.logps.detach()  # [N]
        log_ratio = scores.logps - old  # [N]
        used_ratio = _over_rollouts(scores, log_ratio, o.importance_sampling_level)  # [N]
        rho = bounded_exp(used_ratio)  # [N]
        losses = surrogate(scores.logps, rho, advantages, o)  # [N]
        metrics = self._metrics(batch, scores, advantages, log_ratio, rho)
        bounded = used_ratio > MAX_LOG_RATIO  # [N]
        apart = self._from_reference(batch, scores, models)  # [N]
        if apart is not None:
            kl = kl_estimate(apart, o.kl_estimator)
            metrics["kl"] = kl.detach().sum(), metrics["ratio"][1]
            if o.kl_estimator == "k3":
                bounded = bounded | (apart < -MAX_LOG_RATIO)
            if o.kl_in == "loss":
                losses = losses + o.kl_coef * (kl * rho if o.kl_times_ratio else kl)
        metrics["bounded_fraction"] = bounded.float().sum(), metrics["ratio"][1]
        if o.entropy_coef:
            losses = losses - o.entropy_coef * scores.entropy
        if o.vf_coef:
            returns = batch.target_feature("returns")  # [N]
            before = batch.target_feature("values") if "values" in batch.token_features else None  # [N]
            errors = value_losses(scores.values, returns, before, o.eps_value)
            losses = losses + o.vf_coef * errors
            metrics["value_loss"] = errors.detach().sum(), metrics["ratio"][1]
            metrics |= value_metrics(scores.values, returns, before, o.eps_value)
        if o.loss_aggregation == "grpo":
            losses = losses / _lengths(scores)
        return LossOutput(losses.sum(), self.num_items(batch), metrics)

    def _from_reference(self, batch: Batch, scores: PolicyOutput, models: Models) -> Tensor | None:
        """log p - log p_ref -> [N]; None where there is neither a reference nor a column of its log-probabilities."""
        if models.reference is not None:
            return scores.logps - models.reference(batch, temperature=self.temperature).logps
        return scores.logps - batch.target_feature("ref_logps") if "ref_logps" in batch.token_features else None

    @torch.no_grad()
    def _metrics(
        self, batch: Batch, scores: PolicyOutput, advantages: Tensor, log_ratio: Tensor, rho: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        o, n = self.options, scores.logps.new_tensor(float(len(scores.logps)))
        good, bad = (advantages > 0).float(), (advantages < 0).float()  # [N], [N]
        figures = {
            "ratio": rho,
            "approx_kl": kl_estimate(-log_ratio, "k3"),  # of the sampling policy to this one
            "entropy": scores.entropy,
            "advantage": advantages,
        }
        if o.loss_aggregation == "cispo":
            figures["clip_fraction/high"] = (rho > o.clip_eps_high).float()
        else:
            figures["clip_fraction/high"] = good * (rho > 1 + o.clip_eps_high)
            figures["clip_fraction/low"] = bad * (rho < 1 - o.clip_eps_low)
        metrics = {name: (figure.sum(), n) for name, figure in figures.items()}
        metrics["logps/positive"] = (scores.logps * good).sum(), good.sum()
        metrics["logps/negative"] = (scores.logps * bad).sum(), bad.sum()
        rewards = batch.doc_feature("reward")[batch.docs_with_targets]  # [D]
        known = rewards == rewards  # NaN where a row with advantages of its own has none
        metrics["reward"] = rewards[known].sum(), known.sum().float()
        return metrics

    def finalize_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Adds the explained variance of a value head."""
        return with_explained_variance(means)


def surrogate(logps: Tensor, rho: Tensor, advantages: Tensor, o: PolicyOptions) -> Tensor:
    """-min(rho A, clip(rho) A), where A < 0 at most -dual_clip A (arXiv 1912.09729); cispo: -sg(min(rho, eps)) A logp.

    All [N].
    """
    if o.loss_aggregation == "cispo":
        return -rho.detach().clamp(max=o.clip_eps_high) * advantages * logps
    losses = torch.maximum(-rho * advantages, -rho.clamp(1 - o.clip_eps_low, 1 + o.clip_eps_high) * advantages)
    if o.dual_clip is None:
        return losses
    return torch.where(advantages < 0, torch.minimum(losses, -o.dual_clip * advantages), losses)


def _lengths(scores: PolicyOutput) -> Tensor:
    """Tokens of its rollout, for each token -> [N]."""
    return scores.per_document(torch.ones_like(scores.logps))[scores.doc_ids]


def _over_rollouts(scores: PolicyOutput, log_ratio: Tensor, kind: str) -> Tensor:
    """Log of the ratio that counts for each token, of `PolicyOptions.importance_sampling_level` -> [N]."""
    if kind == "token":
        return log_ratio
    sums = scores.per_document(log_ratio)[scores.doc_ids]  # [N]
    return sums if kind == "product" else sums / _lengths(scores)
