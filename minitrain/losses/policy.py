"""Policy-gradient losses over rollouts from data files: PPO, GRPO and related methods."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from minitrain.batch import Batch, PolicyOutput, to_device
from minitrain.config.schema import option
from minitrain.errors import DataError

from .advantages import (
    ADVANTAGES,
    DISCOUNTED,
    ESTIMATORS,
    GROUPED,
    MAX_LOG_RATIO,
    Rollouts,
    bounded_exp,
    common_columns,
    estimate,
    kl_estimate,
    penalized_rewards,
    split_held_out,
    whiten,
)
from .base import AddedFeatures, DataFile, Loss, LossOutput, Models, register_loss, scalar
from .dpo import REFERENCE
from .surrogates import aggregate_over_rollouts, lengths, surrogate
from .value import EPS_VALUE, GAE_LAMBDA, GAMMA, value_losses, value_metrics, with_explained_variance

EPS_HIGH = {"dapo": 0.28, "cispo": 5.0}  # from the papers, or common in practice
PER_TOKEN = ("dapo", "cispo", "vespo")  # the unit is the token
ROLLOUT_MEANS = ("grpo", "sapo", "gmpo")  # the unit is the rollout, whose tokens are averaged
SOFT = ("sapo", "vespo")  # without clipping


@dataclass
class PolicyOptions:
    advantage_estimator: str = option(
        "grpo",
        "Estimator of the advantages (see docs/losses.md). given: the column `advantages` of the rows.",
        choices=ADVANTAGES,
        alias="advantages",
    )
    gamma: float = GAMMA
    gae_lambda: float = GAE_LAMBDA
    scale_rewards: str | bool = option(
        "group",
        "grpo: divide by the standard deviation of the rewards of the group (group, or true), of all rewards of the "
        "round or the files (batch), or not at all (none, or false).",
        choices=("group", "batch", "none"),
    )
    whiten: bool | None = option(
        None,
        "Scale advantages to mean 0 and standard deviation 1 over all tokens of the files (default: true with gae, "
        "reinforce++ and reinforce++-baseline).",
    )
    loss_aggregation: str = option(
        "dapo",
        "What the loss sum of a step is divided by (see docs/losses.md). cispo, sapo, gmpo and vespo also replace the "
        "clipped term.",
        choices=("dapo", "grpo", "dr_grpo", "cispo", "sapo", "gmpo", "luspo", "vespo"),
        alias=("loss_type", "normaliser"),
    )
    max_new_tokens: int | None = option(
        None,
        "dr_grpo: largest number of tokens of a response (default: of the longest one in the training files).",
        ge=1,
    )
    importance_sampling_level: str | None = option(
        None,
        "Level of the probability ratio. token: each token. sequence: geometric mean over a response (GSPO). product: "
        "full response (RLOO). Default: sequence with luspo, else token.",
        choices=("token", "sequence", "product"),
        alias="ratio",
    )
    clip_eps_low: float = option(
        0.2, "Clip the ratio at 1 - clip_eps_low from below.", ge=0, le=1, alias=("epsilon", "eps_low")
    )
    clip_eps_high: float | None = option(
        None,
        "Clip the ratio at 1 + clip_eps_high from above; with cispo, at clip_eps_high (default: 0.28 with dapo, 5 with "
        "cispo, else clip_eps_low).",
        gt=0,
        alias=("epsilon_high", "eps_high"),
    )
    dual_clip: float | None = option(None, "Largest ratio where the advantage is negative (default: no limit).", gt=1)
    sapo_temperature_pos: float = option(1.0, "sapo: temperature where the advantage is positive.", gt=0)
    sapo_temperature_neg: float = option(1.05, "sapo: temperature elsewhere.", gt=0)
    vespo_k_pos: float = option(2.0, "vespo: k where the advantage is not negative.", ge=0)
    vespo_lambda_pos: float = option(3.0, "vespo: lambda where the advantage is not negative.", ge=0)
    vespo_k_neg: float = option(3.0, "vespo: k where the advantage is negative.", ge=0)
    vespo_lambda_neg: float = option(2.0, "vespo: lambda where the advantage is negative.", ge=0)
    temperature: float = option(
        1.0, "Sampling temperature of the responses; old_logps are computed at it, too.", ge=0.01, le=100
    )
    entropy_coef: float = option(0.0, "Weight of the entropy bonus.", ge=0)
    kl_coef: float = option(0.0, "Weight of the KL to the reference.", ge=0)
    kl_in: str = option(
        "auto",
        "Add the KL to the loss, or subtract it from the rewards. auto: reward with gae and reinforce++, else loss.",
        choices=("auto", "loss", "reward"),
    )
    kl_estimator: str | None = option(
        None,
        "Estimator of the KL, see docs/losses.md (default: k3 in the loss, k1 in the rewards).",
        choices=ESTIMATORS,
    )
    kl_times_ratio: bool = option(
        False, "Multiply the KL in the loss by the ratio, so that its gradient is that of KL(policy || reference)."
    )
    reference: str = REFERENCE
    vf_coef: float = option(0.0, "Weight of the value loss, such as 0.1. Above 0, the policy gets a value head.", ge=0)
    eps_value: float = EPS_VALUE

    def __post_init__(self):
        if self.kl_in == "auto":
            self.kl_in = "reward" if self.advantage_estimator in DISCOUNTED else "loss"
        if self.kl_estimator is None:
            self.kl_estimator = "k1" if self.kl_in == "reward" else "k3"
        if self.clip_eps_high is None:
            self.clip_eps_high = EPS_HIGH.get(self.loss_aggregation, self.clip_eps_low)
        if self.whiten is None:
            self.whiten = self.advantage_estimator in (*DISCOUNTED, "reinforce++-baseline")
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        if self.importance_sampling_level is None:
            self.importance_sampling_level = "sequence" if self.loss_aggregation == "luspo" else "token"


@register_loss("policy", PolicyOptions)
class PolicyLoss(Loss):
    """-min(rho A, clip(rho, 1 - eps_l, 1 + eps_h) A) of each token, rho = p / p_old (arXiv 1707.06347, eq. 7).

    With dapo (arXiv 2503.14476), cispo (arXiv 2506.13585) and vespo (arXiv 2602.10693) the unit is the token. With
    grpo (arXiv 2402.03300), sapo (arXiv 2511.20347) and gmpo (arXiv 2507.20673) it is the rollout, whose tokens are
    averaged. With luspo (arXiv 2602.05261) it is the rollout, whose tokens are summed. With dr_grpo (arXiv 2503.20783)
    a rollout counts as max_new_tokens units.
    KL, entropy and value terms are summed the same way. Rollouts without old_logps count as sampled from the current
    policy: rho is 1, and the gradient is that of -A log p.
    """

    example_type = "rollout"
    full_lr = 1e-6
    dropout = False

    def __init__(self, options: PolicyOptions):
        super().__init__(options)
        self.max_new_tokens = options.max_new_tokens

    def unused_options(self) -> dict[str, str]:
        o, unused = self.options, {}
        if o.advantage_estimator not in DISCOUNTED and (o.advantage_estimator == "given" or not o.vf_coef):
            unused["gamma"] = "it needs loss.advantage_estimator=gae or reinforce++, or returns for loss.vf_coef."
        if o.advantage_estimator != "gae":
            unused["gae_lambda"] = "it needs loss.advantage_estimator=gae."
        if o.advantage_estimator != "grpo":
            unused["scale_rewards"] = "it needs loss.advantage_estimator=grpo."
        if o.loss_aggregation != "dr_grpo":
            unused["max_new_tokens"] = "it needs loss.loss_aggregation=dr_grpo."
        unused |= self._unused_in_surrogate()
        if not o.kl_coef:
            unused |= dict.fromkeys(("kl_in", "kl_estimator", "kl_times_ratio", "reference"), "it needs loss.kl_coef.")
        elif o.kl_in == "reward":
            unused["kl_times_ratio"] = "it needs loss.kl_in=loss."
            if o.advantage_estimator == "given":
                unused["kl_in"] = "given advantages are not computed from rewards."
        if not o.vf_coef:
            unused["eps_value"] = "it needs loss.vf_coef."
        return unused

    def _unused_in_surrogate(self) -> dict[str, str]:
        name, unused = self.options.loss_aggregation, {}
        for other in SOFT:
            if name != other:
                keys = [f.name for f in fields(PolicyOptions) if f.name.startswith(f"{other}_")]
                unused |= dict.fromkeys(keys, f"it needs loss.loss_aggregation={other}.")
        if name == "cispo":
            unused |= dict.fromkeys(("clip_eps_low", "dual_clip"), "cispo clips at clip_eps_high alone.")
        if name in SOFT:
            unused |= dict.fromkeys(("clip_eps_low", "clip_eps_high", "dual_clip"), f"{name} does not clip.")
        if name == "gmpo":
            unused["dual_clip"] = "gmpo bounds the ratio at clip_eps_low and clip_eps_high."
        if name in ("gmpo", "vespo"):
            unused["importance_sampling_level"] = f"{name} computes its own ratio of a rollout."
        return unused

    def conflicts(self) -> dict[str, str]:
        o = self.options
        if o.kl_coef and o.kl_in == "loss" and o.kl_estimator == "k1" and not o.kl_times_ratio:
            reason = "the gradient of k1 in the loss is 0 in expectation. Set k2, k3, loss.kl_times_ratio=true or "
            return {"kl_estimator": reason + "loss.kl_in=reward."}
        return {}

    @property
    def requires(self) -> frozenset[str]:
        has_kl = self.options.kl_coef > 0 and (self.options.kl_in == "loss" or self.online)
        return frozenset({"reference"} if has_kl else ()) | frozenset({"values"} if self.options.vf_coef else ())

    @property
    def temperature(self) -> float:
        return self.options.temperature

    def on_data_loaded(self, train: Sequence[DataFile], eval: Sequence[DataFile]) -> list[AddedFeatures]:
        """Return the columns `advantages` and, for a value head, `returns`."""
        common_columns([*train, *eval])
        rollouts, estimator = Rollouts(train), self.options.advantage_estimator
        self.max_new_tokens = self.options.max_new_tokens or int(rollouts.lengths.max())
        if not self.online and estimator in GROUPED and int(rollouts.groups().bincount().max()) < 2:
            raise DataError(
                f"{train[0].source}: no prompt has two rollouts, and loss.advantage_estimator={estimator} compares the "
                "rollouts of a prompt. Sample several for each prompt, or set loss.advantage_estimator=reinforce++.",
                "unsuitable-data",
            )
        return [added for files in split_held_out(train, eval) for added in self._advantages(Rollouts(files))]

    def _advantages(self, rollouts: Rollouts) -> list[AddedFeatures]:
        o = self.options
        if o.advantage_estimator == "given":
            advantages = rollouts.column("advantages", "loss.advantage_estimator=given")
            returns = (
                rollouts.column("returns", "loss.vf_coef with loss.advantage_estimator=given") if o.vf_coef else None
            )
        else:
            rewards = penalized_rewards(rollouts, o.kl_coef if o.kl_in == "reward" else 0.0, o.kl_estimator)
            advantages, returns = estimate(
                rollouts, rewards, o.advantage_estimator, o.gamma, o.gae_lambda, o.scale_rewards
            )
        columns = {"advantages": whiten(advantages) if o.whiten else advantages}
        return rollouts.as_features(**columns, **({"returns": returns} if o.vf_coef else {}))

    def num_items(self, batch: Batch) -> Tensor:
        if self.options.loss_aggregation in PER_TOKEN:
            return scalar(batch.n_targets, batch)
        rollouts = batch.docs_with_targets.sum().float()
        return scalar(rollouts * self.max_new_tokens if self.options.loss_aggregation == "dr_grpo" else rollouts, batch)

    def __call__(self, batch: Batch, models: Models) -> LossOutput:
        o = self.options
        scores = models.policy(batch, entropy=True, temperature=o.temperature)
        advantages = batch.target_feature("advantages")  # [N]
        old = batch.target_feature("old_logps") if "old_logps" in batch.token_features else scores.logps.detach()  # [N]
        log_ratio = scores.logps - old  # [N]
        level_log_ratio = aggregate_over_rollouts(scores, log_ratio, o.importance_sampling_level)  # [N]
        rho = bounded_exp(level_log_ratio)  # [N]
        losses = surrogate(scores, log_ratio, rho, advantages, o)  # [N]
        if "importance_weights" in batch.token_features:
            losses = losses * batch.target_feature("importance_weights")
        metrics = self._metrics(batch, scores, advantages, old, rho)
        n = metrics["entropy"][1]
        bounded = level_log_ratio > MAX_LOG_RATIO  # [N]
        ref_log_ratio = self._ref_log_ratio(batch, scores, models)  # [N]
        if ref_log_ratio is not None:
            kl = kl_estimate(ref_log_ratio, o.kl_estimator)
            metrics["kl"] = kl.detach().sum(), n
            if o.kl_estimator == "k3":
                bounded = bounded | (ref_log_ratio < -MAX_LOG_RATIO)
            if o.kl_in == "loss":
                losses = losses + o.kl_coef * (kl * rho if o.kl_times_ratio else kl)
        metrics["bounded_fraction"] = bounded.float().sum(), n
        if o.entropy_coef:
            losses = losses - o.entropy_coef * scores.entropy
        if o.vf_coef:
            returns = batch.target_feature("returns")  # [N]
            old_values = batch.target_feature("values") if "values" in batch.token_features else None  # [N]
            errors = value_losses(scores.values, returns, old_values, o.eps_value)
            losses = losses + o.vf_coef * errors
            metrics["value_loss"] = errors.detach().sum(), n
            metrics |= value_metrics(scores.values, returns, old_values, o.eps_value)
        if o.loss_aggregation in ROLLOUT_MEANS:
            losses = losses / lengths(scores)
        return LossOutput(losses.sum(), self.num_items(batch), metrics)

    def _ref_log_ratio(self, batch: Batch, scores: PolicyOutput, models: Models) -> Tensor | None:
        """Return log p - log p_ref -> [N], or None without a reference model and without ref_logps in the data."""
        if models.reference is not None and self.options.kl_in == "loss":
            return scores.logps - models.reference(batch, temperature=self.temperature).logps
        return scores.logps - batch.target_feature("ref_logps") if "ref_logps" in batch.token_features else None

    @torch.no_grad()
    def _metrics(
        self, batch: Batch, scores: PolicyOutput, advantages: Tensor, old: Tensor, rho: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        o, n = self.options, scalar(len(scores.logps), batch)
        good, bad = (advantages > 0).float(), (advantages < 0).float()  # [N], [N]
        per_token = {"entropy": scores.entropy, "advantage": advantages}
        if "sample_logps" in batch.token_features:
            per_token["mismatch"] = (old - batch.target_feature("sample_logps")).abs()
        if "old_logps" in batch.token_features:  # else the ratio is 1 by construction
            per_token["ratio"] = rho
            per_token["approx_kl"] = kl_estimate(old - scores.logps, "k3")  # from the sampling policy to this one
            if o.loss_aggregation == "cispo":
                per_token["clip_fraction/high"] = (rho > o.clip_eps_high).float()
            elif o.loss_aggregation not in SOFT:
                per_token["clip_fraction/high"] = good * (rho > 1 + o.clip_eps_high)
                per_token["clip_fraction/low"] = bad * (rho < 1 - o.clip_eps_low)
        metrics = {name: (values.sum(), n) for name, values in per_token.items()}
        metrics["logps/positive"] = (scores.logps * good).sum(), good.sum()
        metrics["logps/negative"] = (scores.logps * bad).sum(), bad.sum()
        rewards = batch.doc_feature("reward")  # [D]
        known = to_device(batch.docs_with_targets, rewards.device) & ~rewards.isnan()  # [D] rows may have no reward
        metrics["reward"] = rewards.where(known, 0).sum(), known.sum().float()
        return metrics

    def finalize_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Add the explained variance of a value head."""
        return with_explained_variance(means)
