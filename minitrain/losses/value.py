"""Value models: what a rollout will still earn from each of its tokens on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minitrain.batch import Batch
from minitrain.config.schema import option
from minitrain.errors import ConfigError

from .advantages import ESTIMATORS, Rollouts, apart, common_columns, estimate, penalised_rewards
from .base import AddedFeatures, DataFile, Loss, LossOutput, Models, register_loss

GAMMA = option(1.0, "Discount of what comes a token later.", ge=0, le=1)
GAE_LAMBDA = option(
    0.95, "gae: lambda, from one step of foresight (0) to the full rollout (1).", ge=0, le=1, alias="lam"
)
EPS_VALUE = option(0.2, "How far a value may move from the row's `values` before it is clipped.", gt=0)


@dataclass
class ValueOptions:
    gamma: float = GAMMA
    gae_lambda: float = GAE_LAMBDA
    eps_value: float = EPS_VALUE
    kl_coef: float = option(
        0.0,
        "Each token's reward is lessened by so much of its KL to the reference; needs old_logps, ref_logps.",
        ge=0,
    )
    kl_estimator: str = option("k1", "Of that KL (see docs/losses.md).", choices=ESTIMATORS)


@register_loss("value", ValueOptions)
class Value(Loss):
    """``0.5 max((V - R)^2, (clip(V, V_old +- eps) - R)^2)`` of a scalar head at each token; the unit is the token.

    Schulman et al. 2017 (arXiv 1707.06347), clipped as in their code. R are the rows' own `returns`; without these
    A + V_old of generalised advantage estimation where rows have `values`, else what the rollout earned from the token
    on. Without `values` nothing is clipped.
    """

    example_type = "rollout"
    dropout = False

    def unused_options(self) -> dict[str, str]:
        return {} if self.options.kl_coef else {"kl_estimator": "it needs loss.kl_coef."}

    @property
    def head_labels(self) -> list[str]:
        return ["value"]

    def on_data_loaded(self, train: Sequence[DataFile], eval: Sequence[DataFile]) -> list[AddedFeatures]:
        """Return the column `returns`, unless the rows have it."""
        o, columns, added = self.options, common_columns([*train, *eval]), []
        if "returns" in columns:
            return []
        kind = "gae" if "values" in columns else "reinforce++"
        for files in apart(train, eval):
            rollouts = Rollouts(files)
            rewards = penalised_rewards(rollouts, o.kl_coef, o.kl_estimator)
            _, returns = estimate(rollouts, rewards, kind, o.gamma, o.gae_lambda, False)
            added += rollouts.as_features(returns=returns)
        return added

    def num_items(self, batch: Batch) -> Tensor:
        return torch.tensor(float(batch.n_targets), device=batch.targets.device)

    def __call__(self, batch: Batch, models: Models) -> LossOutput:
        values, returns = models.policy(batch).values, batch.target_feature("returns")  # [N], [N]
        if values is None:
            raise ConfigError(
                "loss.name: value needs a model that reads from left to right, not an encoder.", "conflict"
            )
        old = batch.target_feature("values") if "values" in batch.token_features else None  # [N]
        losses = value_losses(values, returns, old, self.options.eps_value)
        return LossOutput(
            losses.sum(), self.num_items(batch), value_metrics(values, returns, old, self.options.eps_value)
        )

    def finalize_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Adds the explained variance."""
        return with_explained_variance(means)


def value_losses(values: Tensor, returns: Tensor, old: Tensor | None, eps: float) -> Tensor:
    """0.5 max((V - R)^2, (clip(V, V_old +- eps) - R)^2) -> [N]; without V_old the first alone."""
    losses = 0.5 * (values - returns) ** 2
    if old is None:
        return losses
    clipped = old + (values - old).clamp(-eps, eps)
    return torch.maximum(losses, 0.5 * (clipped - returns) ** 2)


@torch.no_grad()
def value_metrics(values: Tensor, returns: Tensor, old: Tensor | None, eps: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Means over tokens, and the moments that `with_explained_variance` needs."""
    weight = values.new_tensor(float(len(values)))
    # A variance from moments in float32 loses its digits where the mean is large.
    values, returns = (values, returns) if values.device.type == "mps" else (values.double(), returns.double())
    errors = returns - values
    figures = {"value": values, "return": returns, "return^2": returns**2, "error": errors, "error^2": errors**2}
    if old is not None:
        figures["value_clip_fraction"] = ((values - old).abs() > eps).float()
    return {name: (figure.sum(), weight) for name, figure in figures.items()}


def with_explained_variance(means: dict[str, float]) -> dict[str, float]:
    """1 - Var(R - V) / Var(R) in the place of the moments; nothing where all returns are the same."""
    figures = {name: mean for name, mean in means.items() if name not in ("return^2", "error", "error^2")}
    if "return^2" in means:
        spread = means["return^2"] - means["return"] ** 2
        unexplained = means["error^2"] - means["error"] ** 2
        if spread > 1e-12 * means["return^2"]:
            figures["explained_variance"] = 1 - unexplained / spread
    return figures
