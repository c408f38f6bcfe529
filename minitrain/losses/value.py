"""Value models: the expected return from each token of a rollout."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minitrain.batch import Batch, PolicyOutput
from minitrain.config.schema import option
from minitrain.errors import ConfigError

from .advantages import ESTIMATORS, Rollouts, common_columns, estimate, penalized_rewards, split_held_out
from .base import AddedFeatures, DataFile, Loss, LossOutput, Models, register_loss, scalar

GAMMA = option(1.0, "Discount factor of the rewards, per token.", ge=0, le=1)
GAE_LAMBDA = option(0.95, "gae: lambda, from one-step estimates (0) to the full rollout (1).", ge=0, le=1, alias="lam")
EPS_VALUE = option(0.2, "Clip range of a value around the column `values` of the row.", gt=0)


@dataclass
class ValueOptions:
    gamma: float = GAMMA
    gae_lambda: float = GAE_LAMBDA
    eps_value: float = EPS_VALUE
    kl_coef: float = option(
        0.0,
        "Weight of the KL to the reference, subtracted from each token's reward. Needs old_logps and ref_logps.",
        ge=0,
    )
    kl_estimator: str = option("k1", "Estimator of the KL (see docs/losses.md).", choices=ESTIMATORS)


@register_loss("value", ValueOptions)
class Value(Loss):
    """``0.5 max((V - R)^2, (clip(V, V_old +- eps) - R)^2)`` of a scalar head at each token; the unit is the token.

    Schulman et al. 2017 (arXiv 1707.06347), clipped as in their code. R is the column `returns` of the rows. Without
    it, R is A + V_old of generalized advantage estimation if the rows have `values`, else the discounted sum of later
    rewards. Without `values`, nothing is clipped.
    """

    example_type = "rollout"
    dropout = False

    def unused_options(self) -> dict[str, str]:
        return {} if self.options.kl_coef else {"kl_estimator": "it needs loss.kl_coef."}

    @property
    def head_labels(self) -> list[str]:
        return ["value"]

    def on_data_loaded(self, train: Sequence[DataFile], eval: Sequence[DataFile]) -> list[AddedFeatures]:
        """Return the column `returns`, unless the rows have one."""
        o, columns, added = self.options, common_columns([*train, *eval]), []
        if "returns" in columns:
            return []
        estimator = "gae" if "values" in columns else "reinforce++"
        for files in split_held_out(train, eval):
            rollouts = Rollouts(files)
            rewards = penalized_rewards(rollouts, o.kl_coef, o.kl_estimator)
            _, returns = estimate(rollouts, rewards, estimator, o.gamma, o.gae_lambda, "none")
            added += rollouts.as_features(returns=returns)
        return added

    def num_items(self, batch: Batch) -> Tensor:
        return scalar(batch.n_targets, batch)

    def __call__(self, batch: Batch, models: Models) -> LossOutput:
        values, returns = values_of(models.policy(batch), self.name), batch.target_feature("returns")  # [N], [N]
        old = batch.target_feature("values") if "values" in batch.token_features else None  # [N]
        losses = value_losses(values, returns, old, self.options.eps_value)
        return LossOutput(
            losses.sum(), self.num_items(batch), value_metrics(values, returns, old, self.options.eps_value)
        )

    def finalize_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Add the explained variance."""
        return with_explained_variance(means)


def values_of(output: PolicyOutput, name: str) -> Tensor:
    """Return the values of the targets, shape [N]. Raise ConfigError if the model is an encoder."""
    if output.values is None:
        raise ConfigError(
            f"loss.name: {name} needs a causal model, and this model is an encoder. Use another model.", "conflict"
        )
    return output.values


def value_losses(values: Tensor, returns: Tensor, old: Tensor | None, eps: float) -> Tensor:
    """Return 0.5 max((V - R)^2, (clip(V, V_old +- eps) - R)^2), or 0.5 (V - R)^2 without V_old. All [N]."""
    losses = 0.5 * (values - returns) ** 2
    if old is None:
        return losses
    clipped = old + (values - old).clamp(-eps, eps)
    return torch.maximum(losses, 0.5 * (clipped - returns) ** 2)


@torch.no_grad()
def value_metrics(values: Tensor, returns: Tensor, old: Tensor | None, eps: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Return metrics of tokens [N] as (sum, weight), with the moments that `with_explained_variance` needs."""
    weight = values.new_full((), float(len(values)))
    # In float32, a variance computed from moments loses its digits if the mean is large.
    values, returns = (values, returns) if values.device.type == "mps" else (values.double(), returns.double())
    errors = returns - values
    per_token = {"value": values, "return": returns, "return^2": returns**2, "error": errors, "error^2": errors**2}
    if old is not None:
        per_token["value_clip_fraction"] = ((values - old).abs() > eps).float()
    return {name: (tokens.sum(), weight) for name, tokens in per_token.items()}


def with_explained_variance(means: dict[str, float]) -> dict[str, float]:
    """Replace the moments by 1 - Var(R - V) / Var(R), which is left out if all returns are equal."""
    metrics = {name: mean for name, mean in means.items() if name not in ("return^2", "error", "error^2")}
    if "return^2" in means:
        spread = means["return^2"] - means["return"] ** 2
        unexplained = means["error^2"] - means["error"] ** 2
        if spread > 1e-12 * means["return^2"]:
            metrics["explained_variance"] = 1 - unexplained / spread
    return metrics
