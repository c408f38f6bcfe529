"""Add to a round the log-probabilities and values that its loss needs, computed by the models before training."""

from typing import TYPE_CHECKING

import torch

from minitrain.config.sections import RolloutConfig
from minitrain.data.cache import TokenCache
from minitrain.losses.advantages import bounded_exp
from minitrain.training.aux_models import iter_batches_with_positions
from minitrain.training.step import inference

if TYPE_CHECKING:
    from .rounds import Rounds


def add_logps(rounds: "Rounds", cache: TokenCache) -> dict[str, float]:
    """Add `old_logps`, `ref_logps` and `values` where the loss reads them, and the weights of the correction.

    A round of one step needs no old_logps: the policy that is trained is the one that sampled. A server or a copy can
    have other weights, so its log-probabilities are compared in each round.

    Returns:
        Metrics of `mismatch_metrics`; {} if no old_logps were needed.
    """
    trainer, options = rounds.trainer, rounds.options
    loss, models, parallel = trainer.loss, trainer.models, trainer.parallel
    if loss.example_type != "rollout":
        return {}
    in_reward = getattr(loss.options, "kl_coef", 0.0) > 0 and getattr(loss.options, "kl_in", "") == "reward"
    has_own_weights = options.engine != "local" or options.sampler_dtype is not None  # the sampler
    is_compared = options.importance_correction != "none" or has_own_weights
    needs_old = not rounds.is_one_step or in_reward or is_compared
    needs_values = "values" in loss.requires
    names = [*(["old_logps"] if needs_old else []), *(["values"] if needs_values else [])]
    names += ["ref_logps"] if in_reward else []
    if not names:
        return {}
    columns = {name: torch.zeros(len(cache.ids)) for name in names}
    with inference(trainer.policy), trainer.precision.autocast():
        for batch, positions in iter_batches_with_positions(cache, rounds):
            batch = batch.to(parallel.device)
            output = models.policy(batch, temperature=loss.temperature)
            found = {"old_logps": output.logps, "values": output.values}
            if in_reward:
                found["ref_logps"] = models.reference(batch, temperature=loss.temperature).logps
            for name in names:
                columns[name][positions] = found[name].float().cpu()
    parallel.reshard(trainer.policy)
    cache.token_features |= {name: parallel.sum(column) for name, column in columns.items()}
    if "old_logps" not in names:
        return {}
    if options.importance_correction != "none":
        cache.token_features["importance_weights"] = importance_weights(cache, options)
    return mismatch_metrics(cache, options)


def importance_weights(cache: TokenCache, options: RolloutConfig) -> torch.Tensor:
    """Return the weight of each token for the ratio of its probability in training to that in sampling -> [T]."""
    log_ratio = cache.token_features["old_logps"] - cache.token_features["sample_logps"]  # [T]
    if options.correction_level == "sequence":
        sizes = torch.from_numpy(cache.offsets).diff()  # [D]
        documents = torch.arange(len(sizes)).repeat_interleave(sizes)  # [T]
        targets = cache.mask.to(log_ratio.dtype)  # [T]
        sums, counts = (torch.zeros(len(sizes)).index_add(0, documents, x) for x in (log_ratio * targets, targets))
        log_ratio = (sums / counts.clamp_min(1))[documents]
    ratio = bounded_exp(log_ratio)
    if options.importance_correction == "tis":
        return ratio.clamp(max=options.correction_high)
    return ratio.where((ratio >= options.correction_low) & (ratio <= options.correction_high), 0.0)


def mismatch_metrics(cache: TokenCache, options: RolloutConfig) -> dict[str, float]:
    """Return how far the log-probabilities of the sampled tokens in training are from those in sampling.

    Returns:
        mismatch and mismatch/max: mean and maximum of the absolute differences. mismatch/outside: fraction of the
        ratios outside of [correction_low, correction_high]. mismatch/ess: effective sample size of the ratios, as a
        fraction of the tokens.
    """
    old, sampled = (cache.token_features[name][cache.mask.bool()] for name in ("old_logps", "sample_logps"))  # [N]
    difference = old.double() - sampled.double()
    ratio = bounded_exp(difference)
    outside = (ratio < options.correction_low) | (ratio > options.correction_high)
    metrics = {
        "mismatch": difference.abs().mean(),
        "mismatch/max": difference.abs().max(),
        "mismatch/outside": outside.double().mean(),
        "mismatch/ess": ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum()),
    }
    return {name: value.item() for name, value in metrics.items()}
