"""What is kept of the answers of a round or of an evaluation, and their metrics."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from minitrain.inference.evaluation import pass_at_k as estimate

from .documents import JudgedAnswer, has_zero_variance, judged
from .episodes import Episode
from .rewards import Judgement

Stats = dict[str, Any]  # what is logged about an answer, as JSON
Group = tuple[list[JudgedAnswer], list[Stats]]  # the answers to a prompt


def judged_answer(episode: Episode, judgement: Judgement) -> JudgedAnswer:
    """Return what is trained on."""
    of_tokens = episode.token_rewards
    if judgement.tokens:
        of_sampled = iter(judgement.tokens)
        pairs = zip(of_tokens, episode.mask, strict=True)
        of_tokens = [reward + (next(of_sampled, 0.0) if own else 0.0) for reward, own in pairs]
    total, ended = judgement.total, episode.ended
    return JudgedAnswer(episode.prompt.ids, episode.ids, episode.mask, episode.logps, total, ended, of_tokens)


def stats_of(episode: Episode, judgement: Judgement) -> Stats:
    return {
        "source": episode.prompt.source,
        "line": episode.prompt.line,
        "group": episode.prompt.number,
        "prompt": episode.prompt.messages,
        "messages": episode.messages[len(episode.prompt.messages) :],
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
        "reward": _mean(rewards) if rewards else math.nan,  # 0 would be the best of negative rewards
        "ended": _mean([one["ended"] for one in stats]),
        "length": _mean([one["tokens"] for one in stats]),
        "length_max": max((one["tokens"] for one in stats), default=0),
        "turns": _mean([one["turns"] for one in stats]),
        "unjudged": 1 - len(rewards) / max(1, len(stats)),
    }
    for name in sorted({name for one in stats for name in one["parts"]}):
        metrics[f"reward/{name}"] = _mean([one["parts"][name] for one in stats if name in one["parts"]])
    return metrics


def prompt_result(group: Sequence[Stats]) -> dict[str, Any]:
    """Return the results of a prompt: the metrics of its answers, the weight of each, and the answers."""
    metrics = answer_metrics([group]) | pass_at_k([group])
    metrics = {name: value for name, value in metrics.items() if not math.isnan(value)}  # could not be judged
    answers = [one["messages"][-1]["content"] for one in group]
    weights = {name: 1.0 for name in metrics if name != "length_max"}  # which is not a mean
    return {**metrics, "weights": weights, "prompt": group[0]["prompt"], "samples": answers}


def group_metrics(groups: Sequence[Group], keys: Sequence[str]) -> dict[str, float]:
    """Return the metrics of how the answers to a prompt differ.

    Args:
        groups: The answers to each prompt.
        keys: Names of the reward functions. The first decides which answers are right, if it gives only 0 and 1.
    """
    metrics = {
        "reward_std": _mean([float(np.std([a.reward for a in judged(group)])) for group, _ in groups if judged(group)]),
        "zero_variance": _mean([has_zero_variance(group) for group, _ in groups]),
        "distinct": _mean([len({str(one["messages"]) for one in stats}) / len(stats) for _, stats in groups]),
    }
    first = [[_first_reward(one, keys) for one in stats] for _, stats in groups]
    numbers = [[value for value in group if value is not None] for group in first]
    if all(value in (0.0, 1.0) for group in numbers for value in group):
        metrics["solved"] = _mean([min(group, default=0.0) == 1.0 for group in numbers])
        metrics["failed"] = _mean([max(group, default=1.0) == 0.0 for group in numbers])
    if len(keys) > 1:
        every = [one["parts"] for _, stats in groups for one in stats]
        metrics |= {f"unjudged/{key}": _mean([key not in parts for parts in every]) for key in keys}
    return metrics


def _first_reward(stats: Stats, keys: Sequence[str]) -> float | None:
    """Return the result of the first reward function, or the reward if there is only an environment."""
    if keys:
        return stats["parts"].get(keys[0])
    return None if math.isnan(stats["reward"]) else stats["reward"]


def pass_at_k(groups: Sequence[Sequence[Stats]]) -> dict[str, float]:
    """Return pass@k of each reward function whose values are 0 and 1, for k = 1, 2, 4, ... up to the group size.

    Answers that a function could not judge are left out.
    """
    names = sorted({name for group in groups for one in group for name in one["parts"]})
    metrics: dict[str, float] = {}
    for name in names:
        judged_ones = [[one["parts"][name] for one in group if name in one["parts"]] for group in groups]
        values = [group for group in judged_ones if group]
        n, k = min(map(len, values)), 1
        if n == 1 or any(value not in (0.0, 1.0) for group in values for value in group):
            continue
        while k <= n:
            metrics[f"pass@{k}/{name}"] = _mean([estimate(len(g), int(sum(g)), k) for g in values])
            k *= 2
    return metrics


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else 0.0
