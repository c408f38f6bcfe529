"""The registry of reward functions, and the rewards of a round of answers."""

import inspect
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minitrain.config.issues import ConfigIssues, check_types
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
        function: Maps (answer, options) to a number, to a list with a number for each sampled token, to None if it
            cannot judge the answer, or to a dict with one of these as `reward` next to numbers to log. It can be an
            `async` function.
        options_class: The dataclass of its options.
        whole_round: Whether it maps (answers, options) to a list of these instead.
        is_model: Whether it maps (options, trainer) to an object that maps conversations to such a list, in the main
            process.
        check: Returns (option, code, message) for each problem of the options.
        reads: Whether a data row has what the function needs, given (row, options).
    """

    function: Callable[..., Any]
    options_class: type
    whole_round: bool = False
    is_model: bool = False
    check: Callable[[Any], Sequence[tuple[str, str, str]]] = lambda options: ()
    reads: Callable[[Mapping[str, Any], Any], bool] = lambda row, options: True


_REGISTRY: dict[str, RewardFunction] = {}


def register_reward(name: str, options_class: type = NoOptions, whole_round: bool = False, **details: Any) -> Callable:
    """Register the decorated function as a reward.

    Args:
        name: Its name in `rollout.rewards`.
        options_class: A dataclass of its options.
        whole_round: Call it once for all answers of a round.
        details: The other attributes of `RewardFunction`.
    """

    def register(function: Callable) -> Callable:
        known = _REGISTRY.get(name)
        if known is not None and known.function.__qualname__ != function.__qualname__:
            raise ConfigError(f"a reward named {name!r} is already registered. Use another name.", "already-exists")
        _REGISTRY[name] = RewardFunction(function, options_class, whole_round, **details)
        return function

    return register


def registered() -> dict[str, RewardFunction]:
    """Return the registered rewards by name."""
    return dict(_REGISTRY)


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

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.function.function)

    @property
    def judges_together(self) -> bool:
        """Whether one call judges all answers of a round: of a function of the round, or of an async function."""
        return self.function.whole_round or self.is_async


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
        if issues:
            continue
        n_same = sum(reward.name == name for reward in rewards)
        unique = name if not n_same else f"{name}_{n_same + 1}"
        rewards.append(Reward(name, unique, common.get("weight", 1.0), options_class(**options)))
        for option_name, code, message in rewards[-1].function.check(rewards[-1].options):
            issues.add(f"{key}.{option_name}", code, message)
    return rewards


@dataclass
class Judgement:
    """The reward of an answer.

    Attributes:
        total: The weighted sum of the rewards; NaN if no function could judge the answer.
        tokens: The part of it that belongs to each sampled token; empty if no function gives rewards to tokens.
        parts: The result of each function by its key, without those that could not judge.
        extra: Other numbers to log.
    """

    total: float = math.nan
    tokens: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    extra: dict[str, float] = field(default_factory=dict)


def combine(results: Sequence[Sequence[Any]], rewards: Sequence[Reward], failures: Counter) -> list[Judgement]:
    """Return the judgement of each answer.

    Args:
        results: What each function returned for each answer.
        rewards: The functions.
        failures: Counts invalid results, failures and rounds without a result by their description.
    """
    judgements = [Judgement() for _ in results[0]]
    for reward, of_reward in zip(rewards, results, strict=True):
        results_read = [read_result(result) for result in of_reward]
        if all(read.number is None and not read.problem for read in results_read):
            failures[f"{reward.key}: judged none of the answers"] += len(of_reward)
        for judgement, read in zip(judgements, results_read, strict=True):
            if read.problem:
                failures[f"{reward.key}: {read.problem}"] += 1
            if read.number is not None:
                judgement.parts[reward.key] = read.number
                weighted = reward.weight * read.number
                judgement.total = weighted if math.isnan(judgement.total) else judgement.total + weighted
            if read.tokens:
                before = judgement.tokens or [0.0] * len(read.tokens)
                judgement.tokens = [a + reward.weight * b for a, b in zip(before, read.tokens, strict=True)]
            judgement.extra |= {f"{reward.key}/{name}": value for name, value in read.extra.items()}
    return judgements


@dataclass(frozen=True)
class Failed:
    """A call of a reward function that failed; `problem` says how."""

    problem: str


class Result(NamedTuple):
    """The result of a reward function for an answer.

    Attributes:
        number: The reward, which is the sum of `tokens` if there are some; None if it could not judge.
        tokens: The reward of each sampled token.
        extra: Other numbers to log.
        problem: What is wrong with the result.
    """

    number: float | None = None
    tokens: Sequence[float] = ()
    extra: Mapping[str, float] = {}
    problem: str = ""


def read_result(result: Any, n_tokens: int | None = None) -> Result:
    """Return what a reward function returned for an answer, which has `n_tokens` sampled tokens."""
    extra: dict[str, float] = {}
    if isinstance(result, Failed):
        return Result(problem=result.problem)
    if isinstance(result, Mapping):
        extra = {str(key): float(value) for key, value in result.items() if key != "reward" and _is_number(value)}
        if "reward" not in result:
            return Result(extra=extra, problem="returned a dict without `reward`")
        result = result["reward"]
    if result is None:
        return Result(extra=extra)
    if isinstance(result, (list, tuple)) and all(map(_is_number, result)):
        if n_tokens is not None and len(result) != n_tokens:
            return Result(extra=extra, problem=f"returned {len(result)} numbers for {n_tokens} sampled tokens")
        return Result(float(sum(result)), [float(number) for number in result], extra)
    if not _is_number(result):
        return Result(extra=extra, problem=f"returned {short(result)!r}, not a finite number or a list of them")
    return Result(float(result), extra=extra)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
