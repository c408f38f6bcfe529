"""What is logged about the answers of a round or of an evaluation."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .documents import JudgedAnswer, has_zero_variance, judged
from .episodes import Episode
from .rewards import Judgement

Stats = dict[str, Any]  # what is logged about an answer, as JSON


def stats_of(episode: Episode, judgement: Judgement) -> Stats:
    return {
        "prompt": episode.prompt.number,
        "messages": episode.messages,
        "reward": judgement.total,
        "parts": judgement.parts | judgement.extra,
        "ended": episode.ended,
        "turns": episode.turns,
        "tokens": sum(episode.mask),
        "logp": sum(episode.logps) / max(1, sum(episode.mask)),
    }


def answer_metrics(groups: Sequence[Sequence[Stats]]) -> dict[str, float]:
    """Return the metrics of the answers to each prompt."""
    stats = [one for group in groups for one in group]
    rewards = [one["reward"] for one in stats if not math.isnan(one["reward"])]
    metrics = {
        "reward": _mean(rewards),
        "ended": _mean([one["ended"] for one in stats]),
        "length": _mean([one["tokens"] for one in stats]),
        "length_max": max((one["tokens"] for one in stats), default=0),
        "turns": _mean([one["turns"] for one in stats]),
        "unjudged": 1 - len(rewards) / max(1, len(stats)),
        "distinct": _mean([len({str(one["messages"]) for one in group}) / len(group) for group in groups]),
    }
    for name in sorted({name for one in stats for name in one["parts"]}):
        metrics[f"reward/{name}"] = _mean([one["parts"][name] for one in stats if name in one["parts"]])
    return metrics


def round_metrics(answers: Sequence[Sequence[JudgedAnswer]]) -> dict[str, float]:
    """Return the metrics of the rewards within the groups of a round."""
    rewards = [[answer.reward for answer in judged(group)] for group in answers]
    return {
        "reward_std": _mean([float(np.std(group)) for group in rewards if group]),
        "zero_variance": _mean([has_zero_variance(group) for group in answers]),
    }


def pass_at_k(groups: Sequence[Sequence[Stats]]) -> dict[str, float]:
    """Return pass@k of each reward function whose values are 0 and 1, for k = 1, 2, 4, ... up to the group size.

    The unbiased estimate of Chen et al. 2021 (arXiv 2107.03374, eq. 1): the mean of 1 - C(n - c, k) / C(n, k), where c
    of n answers are right.
    """
    n = min((len(group) for group in groups), default=0)
    names = sorted({name for group in groups for one in group for name in one["parts"]})
    metrics: dict[str, float] = {}
    for name in names if n > 1 else ():
        values = [[one["parts"].get(name, 0.0) for one in group] for group in groups]
        if any(value not in (0.0, 1.0) for group in values for value in group):
            continue
        k = 1
        while k <= n:
            passed = [1 - math.comb(len(g) - int(sum(g)), k) / math.comb(len(g), k) for g in values]
            metrics[f"pass@{k}/{name}"] = _mean(passed)
            k *= 2
    return metrics


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else 0.0
