"""The registry of reward functions, and the rewards of a round of answers."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minitrain.config.issues import ConfigIssues, check_types, regex_error
from minitrain.config.option import option
from minitrain.config.suggest import hint_for_value
from minitrain.data.messages import Messages
from minitrain.errors import ConfigError, short


class Answer(NamedTuple):
    """What a reward function sees of a sampled response.

    Attributes:
        text: The last response, without special tokens.
        messages: The conversation with all responses and replies.
        row: The data row of the prompt.
        ids: The sampled token ids of all responses.
        ended: Whether the last response ended by itself, not by max_new_tokens.
        turns: Number of responses.
        group: Index of the prompt in the round.
    """

    text: str
    messages: Messages
    row: Mapping[str, Any]
    ids: list[int]
    ended: bool
    turns: int
    group: int


@dataclass
class NoOptions:
    """The options of a reward function without options."""


class RewardFunction(NamedTuple):
    """A registered reward function.

    Attributes:
        function: Maps (answer, options) to a number, to None if it cannot judge the answer, or to a dict with the
            number as `reward` next to others to log.
        options_class: The dataclass of its options.
        whole_round: Whether it maps (answers, options) to a list of these instead.
    """

    function: Callable[..., Any]
    options_class: type
    whole_round: bool


_REGISTRY: dict[str, RewardFunction] = {}


def register_reward(name: str, options_class: type = NoOptions, whole_round: bool = False) -> Callable:
    """Register the decorated function as a reward.

    Args:
        name: Its name in `rollout.rewards`.
        options_class: A dataclass of its options.
        whole_round: Call it once for all answers of a round.
    """

    def register(function: Callable) -> Callable:
        known = _REGISTRY.get(name)
        if known is not None and known.function.__qualname__ != function.__qualname__:
            raise ConfigError(f"a reward named {name!r} is already registered. Use another name.", "already-exists")
        _REGISTRY[name] = RewardFunction(function, options_class, whole_round)
        return function

    return register


@dataclass
class _Common:
    name: str = option("", "")
    weight: float = option(1.0, "")


@dataclass
class Reward:
    """A reward function with its weight and options.

    Attributes:
        key: Its name in the metrics: that of the function, with a number if there are several.
    """

    name: str
    key: str
    weight: float
    options: Any

    @property
    def function(self) -> RewardFunction:
        return _REGISTRY[self.name]


def build_rewards(entries: Sequence[Any], issues: ConfigIssues) -> list[Reward]:
    """Return the rewards of `rollout.rewards`, and add their problems to `issues`."""
    rewards: list[Reward] = []
    for index, entry in enumerate(entries):
        key = f"rollout.rewards[{index}]"
        entry = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            issues.add(key, "wrong-type", f"expected a name or a mapping with `name`, got {short(entry)!r}.")
            continue
        name = entry["name"]
        if name not in _REGISTRY:
            hint = hint_for_value(key, name, _REGISTRY)
            message = f"unknown reward {name!r}. Use one of {', '.join(_REGISTRY)}, or register it with --plugin.{hint}"
            issues.add(key, "not-a-choice", message)
            continue
        common = check_types(_Common, {k: v for k, v in entry.items() if k in ("name", "weight")}, f"{key}.", issues)
        own = {k: v for k, v in entry.items() if k not in ("name", "weight")}
        options_class = _REGISTRY[name].options_class
        options = check_types(options_class, own, f"{key}.", issues)
        if name == "regex" and "pattern" in options and (error := regex_error(options["pattern"])):
            message = f"{options['pattern']!r} is not a valid regular expression: {error}."
            issues.add(f"{key}.pattern", "invalid-value", message)
        n_same = sum(reward.name == name for reward in rewards)
        if not issues:
            unique = name if not n_same else f"{name}_{n_same + 1}"
            rewards.append(Reward(name, unique, common.get("weight", 1.0), options_class(**options)))
    return rewards


@dataclass
class Judgement:
    """The reward of an answer.

    Attributes:
        total: The weighted sum of the rewards; NaN if no function could judge the answer.
        parts: The result of each function by its key, without those that could not judge.
        extra: Other numbers to log.
    """

    total: float = math.nan
    parts: dict[str, float] = field(default_factory=dict)
    extra: dict[str, float] = field(default_factory=dict)


def combine(results: Sequence[Sequence[Any]], rewards: Sequence[Reward], failures: Counter) -> list[Judgement]:
    """Return the judgement of each answer.

    Args:
        results: What each function returned for each answer.
        rewards: The functions.
        failures: Counts invalid results and failures by their description.
    """
    judgements = [Judgement() for _ in results[0]]
    for reward, of_reward in zip(rewards, results, strict=True):
        for judgement, result in zip(judgements, of_reward, strict=True):
            number, extra, problem = read_result(result)
            if problem:
                failures[f"{reward.key}: {problem}"] += 1
            if number is not None:
                judgement.parts[reward.key] = number
                weighted = reward.weight * number
                judgement.total = weighted if math.isnan(judgement.total) else judgement.total + weighted
            judgement.extra |= {f"{reward.key}/{name}": value for name, value in extra.items()}
    return judgements


@dataclass(frozen=True)
class Failed:
    """A call of a reward function that failed; `problem` says how."""

    problem: str


def read_result(result: Any) -> tuple[float | None, dict[str, float], str]:
    """Return the number, other numbers to log, and the problem of a reward function's result."""
    extra: dict[str, float] = {}
    if isinstance(result, Failed):
        return None, {}, result.problem
    if isinstance(result, Mapping):
        extra = {str(key): float(value) for key, value in result.items() if key != "reward" and _is_number(value)}
        if "reward" not in result:
            return None, extra, "returned a dict without `reward`"
        result = result["reward"]
    if result is None:
        return None, extra, ""
    if not _is_number(result):
        return None, extra, f"returned {short(result)!r}, not a finite number"
    return float(result), extra, ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
