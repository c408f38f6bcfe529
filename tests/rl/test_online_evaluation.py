"""Evaluations of sampled answers: pass@k, the same random numbers each time, greedy exact match, the best model."""

import itertools
import json
import math

import pytest

from minitrain import DataError
from minitrain.rl import rewards
from minitrain.rl.reports import pass_at_k
from minitrain.rl.rewards import register_reward
from minitrain.training.after_step import is_lower_better
from tests.conftest import metrics
from tests.messages import raises
from tests.rl.test_rounds import online  # noqa: F401 (a fixture)


@pytest.fixture(autouse=True)
def own_rewards(monkeypatch):
    monkeypatch.setattr(rewards, "_REGISTRY", dict(rewards._REGISTRY))


def group(values, name="right"):
    return [{"parts": {} if value is None else {name: float(value)}} for value in values]


@pytest.mark.parametrize("right", [(1, 0, 0, 0, 1, 0, 0, 1), (0,) * 8, (1,) * 8])
def test_pass_at_k_is_the_mean_over_all_subsets(right):
    """By enumeration: the fraction of the subsets of k answers with a right one."""
    found = pass_at_k([group(right), group((1,) + 7 * (0,))])
    for k in (1, 2, 4, 8):
        both = [
            sum(map(any, itertools.combinations(values, k))) / math.comb(8, k) for values in (right, (1,) + 7 * (0,))
        ]
        assert found[f"pass@{k}/right"] == pytest.approx(sum(both) / 2)
    assert set(found) == {f"pass@{k}/right" for k in (1, 2, 4, 8)}


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_pass_at_k_is_unbiased(p):
    """Its mean over all outcomes of 5 answers, each right with probability p, is 1 - (1 - p)^k."""
    outcomes = list(itertools.product((0, 1), repeat=5))
    for k in (1, 2, 4):
        mean = sum(p ** sum(o) * (1 - p) ** (5 - sum(o)) * pass_at_k([group(o)])[f"pass@{k}/right"] for o in outcomes)
        assert mean == pytest.approx(1 - (1 - p) ** k)


def test_answers_that_were_not_judged_are_left_out_of_pass_at_k():
    """A prompt without a judged answer is in no mean; the others have at least 3, so k is 1 and 2."""
    found = pass_at_k([group((1, 0, 0, None)), group((None,) * 4), group((1, 1, 1, 1))])
    assert found == {"pass@1/right": pytest.approx((1 / 3 + 1) / 2), "pass@2/right": pytest.approx((2 / 3 + 1) / 2)}
    assert pass_at_k([group((0.5, 1.0))]) == {} and pass_at_k([group((1.0,))]) == {}


def test_each_evaluation_has_the_same_random_numbers(online):  # noqa: F811
    """Without learning, the same answers at each step; with it, other answers from the same numbers."""
    options = {"validation_split": 3, "eval_every_steps": 1, "n_steps": 2, "do_first_eval": True}
    keys, texts = [], []

    def listen(trainer):
        engine, judge = trainer.train_loader.engine, trainer.train_loader.judge
        sample = engine.sample

        def sampling(requests, *rest):
            keys.append(sorted(key for request in requests for key in request.keys))
            return sample(requests, *rest)

        def judging(groups):
            texts.append([episode.ids for one in groups for episode in one])
            return judge(groups)

        engine.sample, trainer.train_loader.judge = sampling, judging

    trainer = online(rollout={"eval_generations": 4}, lr=0.0, **options)
    listen(trainer)
    trainer.train()
    evaluations, of_rounds = keys[::2], keys[1::2]  # before the first step, and after each round
    assert evaluations[0] == evaluations[1] == evaluations[2] and len(set(evaluations[0])) == 12
    assert of_rounds[0] != of_rounds[1] and not set(evaluations[0]) & {key for each in of_rounds for key in each}
    assert texts[0] == texts[2] == texts[4] != texts[1]
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "step", "time")} for row in metrics(trainer, "eval")]
    assert len(rows) == 3 and rows[0] == rows[1] == rows[2]
    keys.clear(), texts.clear()
    learning = online("learning", rollout={"eval_generations": 4}, lr=1e-2, **options)
    listen(learning)
    learning.train()
    assert keys[0] == keys[4] == evaluations[0] and texts[0] != texts[4]


def test_held_out_rewards_are_means_over_the_answers(online):  # noqa: F811
    register_reward("even")(
        lambda answer, options: {"reward": float(len(answer.ids) % 2 == 0), "size": len(answer.ids)}
    )
    rollout = {"eval_generations": 2, "rewards": [{"name": "even", "weight": 3.0}, "length"]}
    trainer, seen = online(rollout=rollout, validation_split=3, n_steps=1), []
    judge = trainer.train_loader.judge
    trainer.train_loader.judge = lambda groups: seen.append(groups) or judge(groups)
    found = trainer.evaluate()
    episodes = [episode for one in seen[0] for episode in one]
    lengths = [len(episode.ids) for episode in episodes]
    even = [n % 2 == 0 for n in lengths]
    assert len(lengths) == 6 and found["reward/even"] == pytest.approx(sum(even) / 6)
    assert found["reward/length"] == pytest.approx(-sum(lengths) / 600)
    assert found["reward"] == pytest.approx(3 * sum(even) / 6 - sum(lengths) / 600)
    assert found["length"] == pytest.approx(sum(lengths) / 6) and found["reward/even/size"] == found["length"]
    assert found["ended"] == sum(episode.ended for episode in episodes) / 6
    pairs = [even[i : i + 2] for i in (0, 2, 4)]
    assert found["pass@2/even"] == pytest.approx(sum(map(any, pairs)) / 3)


def test_greedy_exact_match_next_to_the_reward(online, tmp_path):  # noqa: F811
    """The greedy answers are those of `predict`; one of two references is one of them."""
    trainer = online(n_steps=1)
    said = trainer.predict(["say a", "say b"], max_new_tokens=5)
    file = tmp_path / "eval.jsonl"
    file.write_text(
        json.dumps({"prompt": "say a", "answer": said[0]}) + "\n" + json.dumps({"prompt": "say b", "answer": "no"})
    )
    options = {"eval_datasets": [str(file)], "eval_generate": {"n_examples": 2, "max_new_tokens": 5}}
    found = online("other", n_steps=1, **options).evaluate()
    assert found["exact_match"] == 0.5 and "reward" in found


def test_rows_without_a_reference_are_refused_before_training(online, tmp_path):  # noqa: F811
    (tmp_path / "eval.jsonl").write_text('{"prompt": "say a", "answer": "a"}\n{"prompt": "say b"}\n')
    options = {"eval_datasets": [str(tmp_path / "eval.jsonl")], "eval_generate": {"n_examples": 2}}
    with raises(DataError, "invalid-row", "eval.jsonl:2", "eval_generate"):
        online(**options)
    online(**options | {"eval_generate": {"n_examples": 1}})


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("exact_match", [0.2, 0.6, 0.4], 0.6),
        ("loss", [1.0, 2.0, 3.0], 3.0),  # the reward
        ("pass@2/right", [0.5, 0.2, 0.1], 0.5),
        ("length", [5.0, 3.0, 4.0], 3.0),
    ],
)
def test_the_best_model_is_that_of_the_metric(online, metric, values, best):  # noqa: F811
    """It can be another than the reward, which may be hacked (silent RL bug R46)."""
    trainer = online(
        n_steps=3,
        validation_split=3,
        eval_every_steps=1,
        save_best=True,
        early_stopping={"metric": metric},
        eval_generate={"n_examples": 2} if metric == "exact_match" else {},
    )
    rest = {"reward": 0.0, "exact_match": 0.0} | ({} if metric == "loss" else {metric: 0.0})
    name = "reward" if metric == "loss" else metric
    rewards = iter([1.0, 2.0, 3.0])  # rises throughout
    sequence = iter(values)

    def evaluate(loader):
        if trainer.step == 0:
            return rest | {name: math.nan}
        return rest | {"reward": next(rewards)} | {name: next(sequence)}

    trainer.train_loader.evaluate = evaluate
    trainer.train()
    assert trainer.best == best and trainer.run.best.exists()


def test_the_direction_of_a_metric_is_not_that_of_a_function_with_such_a_name():
    better_low = ("loss", "nll_loss", "perplexity", "kl", "length", "turns", "unjudged")
    assert all(map(is_lower_better, better_low))
    assert not any(
        map(is_lower_better, ("reward", "reward/kl", "reward/length", "pass@2/loss", "exact_match", "ended"))
    )
