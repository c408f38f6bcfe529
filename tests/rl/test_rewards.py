"""Reward functions: the built-in ones, and those that fail."""

import math
from collections import Counter

import pytest

from minitrain import ConfigError
from minitrain.config.issues import ConfigIssues, ConfigSource
from minitrain.rl import rewards as registry
from minitrain.rl.reward_workers import InProcess
from minitrain.rl.rewards import Answer, build_rewards, combine, register_reward
from tests.messages import raises


@pytest.fixture(autouse=True)
def own_rewards(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


def answer(text="4", row=None, ids=(1, 2, 3), ended=True):
    turn = {"role": "assistant", "content": text}
    return Answer(text, [{"role": "user", "content": "2 + 2"}, turn], row or {"answer": "4"}, list(ids), ended, 1, 0)


def build(*entries):
    issues = ConfigIssues(ConfigSource("test"))
    rewards = build_rewards(entries, issues)
    issues.raise_if_any()
    return rewards


def judge(entry, *answers):
    rewards = build(entry)
    return [one.total for one in combine([InProcess().call(rewards[0], answers)], rewards, Counter())]


@pytest.mark.parametrize(
    ("text", "reward"),
    [("4", 1), ("5", 0), ("", 0), ("   ", 0), ("2 + 2", 0), ("4 5", 0), ("3 4 5 6", 0)],
)
def test_exact_match(text, reward):
    """The empty answer, the prompt and all candidates at once earn nothing (silent RL bug R43)."""
    assert judge({"name": "exact_match"}, answer(text)) == [reward]


def test_exact_match_reads_the_reference_of_any_format():
    row = {"messages": [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "it is 4"}]}
    assert judge({"name": "exact_match", "match": "number"}, answer("so 4.0", row)) == [1.0]
    assert math.isnan(judge({"name": "exact_match"}, answer("4", {"prompt": "2 + 2"}))[0])


def test_shapes_of_answers():
    """DAPO's penalty, a length, repeated words and a format."""
    entry = {"name": "overlong", "max_tokens": 10, "buffer": 4}
    assert judge(entry, *(answer(ids=[1] * n) for n in (6, 8, 10, 20))) == [0, -0.5, -1, -1]
    assert judge({"name": "length", "target": 3, "scale": 10}, answer(ids=[1] * 8)) == [-0.5]
    assert judge({"name": "repetition", "n": 1}, answer("a b a b"), answer("a b c")) == [-0.5, 0]
    assert judge({"name": "regex", "pattern": r"<b>.*</b>"}, answer("<b>4</b>"), answer("x <b>4</b>")) == [1, 0]


def test_several_rewards_are_weighted_and_logged_apart():
    rewards = build("exact_match", {"name": "length", "target": 3, "scale": 1, "weight": 0.5}, "exact_match")
    answers = [answer(ids=(1, 2)), answer("4", {"prompt": "x"})]
    judged = combine([InProcess().call(reward, answers) for reward in rewards], rewards, Counter())
    assert judged[0].total == 1 - 0.5 + 1 and judged[0].parts == {"exact_match": 1, "length": -1, "exact_match_2": 1}
    assert judged[1].total == 0 and "exact_match" not in judged[1].parts


def test_a_function_of_the_whole_round():
    register_reward("rank", whole_round=True)(lambda answers, options: [float(len(one.text)) for one in answers])
    register_reward("short", whole_round=True)(lambda answers, options: [1.0])
    assert judge("rank", answer("a"), answer("abc")) == [1, 3]
    assert all(math.isnan(total) for total in judge("short", answer("a"), answer("b")))


def test_a_function_that_cannot_judge_counts_in_no_mean():
    register_reward("silent")(lambda one, options: None)
    failures = Counter()
    rewards = build("silent")
    judged = combine([InProcess().call(rewards[0], [answer()])], rewards, failures)
    assert math.isnan(judged[0].total) and not failures


@pytest.mark.parametrize(
    ("entry", "code", "key"),
    [
        ("exactmatch", "not-a-choice", "rollout.rewards[0]"),
        ({"weight": 1}, "wrong-type", "rollout.rewards[0]"),
        ({"name": "length", "targe": 3}, "unknown-option", "rollout.rewards[0].targe"),
        ({"name": "length", "scale": -1}, "out-of-range", "rollout.rewards[0].scale"),
        ({"name": "length", "weight": "much"}, "wrong-type", "rollout.rewards[0].weight"),
    ],
)
def test_wrong_entries_are_refused(entry, code, key):
    with raises(ConfigError, code, key):
        build(entry)
