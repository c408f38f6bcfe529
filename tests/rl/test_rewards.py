"""Reward functions: the built-in ones, and those that fail."""

import asyncio
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from minitrain import ConfigError
from minitrain.config.issues import ConfigIssues, ConfigSource
from minitrain.losses.advantages import Rollouts, group_relative, penalized_rewards
from minitrain.rl import reward_workers
from minitrain.rl import rewards as registry
from minitrain.rl.documents import Document, JudgedAnswer, as_cache, has_zero_variance, rollouts
from minitrain.rl.reward_workers import InProcess, Workers
from minitrain.rl.rewards import Answer, Failed, build_rewards, combine, register_reward
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


@pytest.mark.parametrize("entry", [{"name": "exact_match", "match": "number"}, {"name": "regex", "pattern": ".*"}])
def test_an_empty_answer_and_the_prompt_itself_earn_nothing(entry):
    """Also where the reference or the pattern fits them (silent RL bug R43)."""
    row = {"answer": "2"}
    assert judge(entry, *(answer(text, row) for text in ("", " \n", "2 + 2", "2"))) == [0, 0, 0, 1]


def test_what_a_tool_said_is_not_the_answer():
    """The tool returns the right answer, and the model says nothing or something else (silent RL bug R17)."""
    tool = [{"role": "user", "content": "2 + 2"}, {"role": "tool", "content": "4"}]
    for text, reward in (("", 0), ("5", 0), ("4", 0), ("it is 4", 1)):
        said = [*tool, {"role": "assistant", "content": text}]
        one = answer(text)._replace(messages=said)
        assert judge({"name": "exact_match", "match": "number"}, one) == [reward]


def test_an_answer_of_the_end_token_alone():
    """Its reward belongs to that token, not to padding or to the prompt (silent RL bug R18)."""
    empty = JudgedAnswer([5, 6, 7], [2], [True], [-1.0], 3.0, True)
    cache = as_cache([[Document(empty, {"reward": 3.0, "group": 0.0})]], "round", Path("round"))
    assert penalized_rewards(Rollouts([cache]), 0.0, "k1").tolist() == [3.0]
    assert cache.mask.tolist() == [0, 0, 0, 1]


def test_equal_rewards_that_are_no_binary_fractions_give_no_advantage():
    """0.95 eight times, and 0.3 as a sum (silent RL bug R44): the group has no variance, its advantages are 0."""
    for rewards in ([0.95] * 8, [0.3, 0.1 + 0.2, 0.3, 0.3]):
        group = [JudgedAnswer([3], [4], [True], [-1.0], reward, True) for reward in rewards]
        assert has_zero_variance(group)
        scores, groups = torch.tensor(rewards, dtype=torch.float64), torch.zeros(len(rewards), dtype=torch.int64)
        assert float(group_relative(scores, groups, True).abs().max()) < 1e-8


def test_an_answer_without_a_reward_changes_no_other():
    """It is not among the rollouts, from which the means of its group are computed (silent RL bug R15)."""
    rewards = (1.0, math.nan, 0.0, 0.5)
    group = [JudgedAnswer([3], [4], [True], [-1.0], reward, True) for reward in rewards]
    assert [document.doc_features["reward"] for document in rollouts(group, 0)] == [1.0, 0.0, 0.5]


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


def test_rewards_of_tokens():
    """A list has a number for each sampled token; with weights, in a sum with other rewards."""
    register_reward("process")(lambda one, options: {"reward": [float(i) for i in one.ids], "steps": 3})
    register_reward("short")(lambda one, options: [1.0])
    register_reward("odd")(lambda one, options: [1.0, math.nan, 2.0])
    rewards = build({"name": "process", "weight": 2.0}, {"name": "length", "target": 3}, "short", "odd")
    failures = Counter()
    (judged,) = combine([InProcess().call(reward, [answer()]) for reward in rewards], rewards, failures)
    assert judged.total == 12 and judged.tokens == [2, 4, 6] and judged.parts == {"process": 6, "length": 0}
    assert judged.extra == {"process/steps": 3} and sum(failures.values()) == 2


def test_an_async_function_is_called_for_all_answers_at_once(monkeypatch):
    """One call hangs and one raises; the others keep their rewards. All wait at the same time."""
    monkeypatch.setattr(reward_workers, "GRACE", 0.5)
    waiting = []

    @register_reward("service")
    async def service(one, options):
        waiting.append(one.text)
        while len(waiting) < 4:  # never, if they were called one after another
            await asyncio.sleep(0.01)
        if one.text == "hangs":
            await asyncio.sleep(60)
        return len(one.text) / (one.text != "raises")

    rewards = build("service")
    answers = [answer(text) for text in ("a", "hangs", "raises", "four")]
    workers = Workers(rewards, 1, timeout=1.0)
    try:
        results = workers.call(rewards[0], answers)
    finally:
        workers.close()
    assert results[::3] == [{"reward": 1.0}, {"reward": 4.0}]
    assert all(isinstance(one, Failed) for one in results[1:3])


def test_an_async_function_of_the_whole_round():
    @register_reward("service", whole_round=True)
    async def service(answers, options):
        await asyncio.sleep(0)
        return [len(one.text) for one in answers]

    assert judge("service", answer("a"), answer("abc")) == [1, 3]


def test_a_function_that_cannot_judge_counts_in_no_mean():
    register_reward("silent")(lambda one, options: None)
    failures = Counter()
    rewards = build("silent")
    judged = combine([[None, 1.0]], rewards, failures)
    assert math.isnan(judged[0].total) and judged[1].total == 1 and not failures


def test_a_function_that_judges_nothing_is_counted():
    """As exact_match for rows without a reference."""
    failures = Counter()
    rewards = build("exact_match", "length")
    answers = [answer(row={"prompt": "x"})] * 3
    combine([InProcess().call(reward, answers) for reward in rewards], rewards, failures)
    assert [(problem.partition(":")[0], count) for problem, count in failures.items()] == [("exact_match", 3)]


@pytest.mark.parametrize(
    ("entry", "code", "key"),
    [
        ("exactmatch", "not-a-choice", "rollout.rewards[0]"),
        ({"weight": 1}, "wrong-type", "rollout.rewards[0]"),
        ({"name": "length", "targe": 3}, "unknown-option", "rollout.rewards[0].targe"),
        ({"name": "length", "scale": -1}, "out-of-range", "rollout.rewards[0].scale"),
        ({"name": "length", "weight": "much"}, "wrong-type", "rollout.rewards[0].weight"),
        ({"name": "exact_match", "match": "("}, "invalid-value", "rollout.rewards[0].match"),
        ({"name": "model"}, "missing-option", "rollout.rewards[0].name_or_path"),
        ({"name": "teacher", "name_or_path": "x", "dtype": "int3"}, "not-a-choice", "rollout.rewards[0].dtype"),
    ],
)
def test_wrong_entries_are_refused(entry, code, key):
    with raises(ConfigError, code, key):
        build(entry)
