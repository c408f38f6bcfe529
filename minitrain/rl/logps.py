"""Add to a round the log-probabilities and values that its loss needs, computed by the models before training."""

from typing import TYPE_CHECKING

import torch

from minitrain.data.cache import TokenCache
from minitrain.training.aux_models import iter_batches_with_positions
from minitrain.training.step import inference

if TYPE_CHECKING:
    from .rounds import Rounds


def add_logps(rounds: "Rounds", cache: TokenCache) -> None:
    """Add `old_logps`, `ref_logps` and `values` where the loss reads them, and the weights of the correction.

    A round of one step needs no old_logps: the policy that is trained is the one that sampled.
    """
    trainer, options = rounds.trainer, rounds.options
    loss, models, parallel = trainer.loss, trainer.models, trainer.parallel
    if loss.example_type != "rollout":
        return
    in_reward = getattr(loss.options, "kl_coef", 0.0) > 0 and getattr(loss.options, "kl_in", "") == "reward"
    n_steps = rounds.steps_per_epoch * options.num_iterations
    needs_old = n_steps > 1 or in_reward or options.importance_correction != "none"
    needs_values = "values" in loss.requires
    names = [*(["old_logps"] if needs_old else []), *(["values"] if needs_values else [])]
    names += ["ref_logps"] if in_reward else []
    if not names:
        return
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
    if options.importance_correction != "none":
        difference = cache.token_features["old_logps"] - cache.token_features["sample_logps"]  # [T]
        ratio = difference.exp()
        weights = ratio.clamp(max=options.correction_high)
        if options.importance_correction == "icepop":
            weights = torch.where((ratio < options.correction_low) | (ratio > options.correction_high), 0.0, ratio)
        cache.token_features["importance_weights"] = weights
