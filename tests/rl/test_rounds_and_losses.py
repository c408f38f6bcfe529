"""Losses of rounds: groups, masked answers, the correction between sampler and trainer, and what is logged."""

from pathlib import Path

import numpy as np
import pytest
import torch

from minitrain.config.sections import RolloutConfig
from minitrain.losses import add_features, create_loss
from minitrain.losses.advantages import GROUPED
from minitrain.rl.documents import JudgedAnswer, as_cache, make_examples
from minitrain.rl.logps import importance_weights, mismatch_metrics
from tests.examples import collated, step
from tests.rl.test_rounds import online  # noqa: F401 (a fixture)


def answer(reward: float, n: int = 2, prompt: int = 0, mask: list[bool] | None = None) -> JudgedAnswer:
    mask = mask or [True] * n
    return JudgedAnswer([3, 4 + prompt], [5] * len(mask), mask, [-1.0] * len(mask), reward, True)


def cache_of(groups: list[list[JudgedAnswer]], **columns: list[float]):
    """The cache of a round. `columns` have a number for each sampled token."""
    cache = as_cache(make_examples(groups, "rollout", RolloutConfig(), False), "round 1", Path("round-1"))
    for name, numbers in columns.items():
        column = torch.zeros(len(cache.ids))
        column[cache.mask.bool()] = torch.tensor(numbers)
        cache.token_features[name] = column
    return cache


def advantages(groups: list[list[JudgedAnswer]], **options) -> list[list[float]]:
    """The advantage of the first token of each answer, by group."""
    cache = cache_of(groups)
    add_features(create_loss("policy", **options), [cache])
    column, result = cache.token_features["advantages"], []
    for first, last in zip(cache.first_documents[:-1], cache.first_documents[1:]):
        spans = [slice(*cache.offsets[number : number + 2]) for number in range(first, last)]
        result.append([column[span][cache.mask[span].bool()][0].item() for span in spans])
    return result


@pytest.mark.parametrize("kind", GROUPED)
def test_groups_are_those_of_the_prompts(kind):
    """Groups of 4, 3 and 4 answers, of different lengths, in any order: each answer keeps its advantage, which is that
    within its prompt (silent RL bugs R11, R12 and R13)."""
    rewards = [[1.0, 0.0, 2.0, 5.0], [3.0, 4.0, 8.0], [-1.0, 0.5, 0.0, 7.0]]
    groups = [[answer(r, 1 + i + k, i) for k, r in enumerate(row)] for i, row in enumerate(rewards)]
    found = advantages(groups, advantage_estimator=kind, whiten=False)
    order = [2, 0, 1]
    moved = advantages([groups[i][::-1] for i in order], advantage_estimator=kind, whiten=False)
    for i, row in zip(order, moved, strict=True):
        assert row[::-1] == pytest.approx(found[i])
    for row, given in zip(found, rewards, strict=True):
        assert np.argsort(row).tolist() == np.argsort(given).tolist() and sum(row) == pytest.approx(0, abs=1e-6)
    equal = [[answer(5.0, 2, i)] * n for i, n in enumerate((4, 3, 3))]
    assert np.abs(np.concatenate(advantages(equal, advantage_estimator=kind))).max() < 1e-8


def test_an_answer_that_could_not_be_judged_is_in_no_mean():
    """And one whose tokens are masked afterwards is: its reward was not lost with its last token (silent RL bugs R15
    and R19)."""
    known = [answer(0.0), answer(1.0), answer(5.0)]
    options = {"scale_rewards": "none"}
    assert advantages([[*known, answer(float("nan"))]], **options) == advantages([known], **options)
    assert advantages([known], **options) == [[-2.0, -1.0, 3.0]]


@pytest.mark.parametrize("kind", ["grpo", "rloo", "reinforce++", "reinforce++-baseline", "gae"])
def test_truncated_answers_keep_their_reward_and_have_no_gradient(online, kind):  # noqa: F811
    """With truncated=mask, advantages are those of truncated=keep, and the gradient is that of the round without the
    truncated answers: they count as no token and no rollout (silent RL bugs R10 and R19)."""
    options = {"name": "policy", "advantage_estimator": kind, "loss_aggregation": "grpo"}
    options |= {"vf_coef": 0.1} if kind == "gae" else {}
    found = {}
    for truncated in ("keep", "mask"):
        trainer = online(truncated, rollout={"truncated": truncated, "max_new_tokens": 12}, loss=options)
        trainer.template.end_ids = lambda: list(range(3, 30))
        batches = next(trainer.train_loader.steps())[1]
        found[truncated] = trainer.train_loader.examples.caches[0]
    ended = found["mask"].doc_features["ended"]
    assert 0 < ended.sum() < len(ended)
    assert torch.equal(found["keep"].token_features["advantages"], found["mask"].token_features["advantages"])
    _, masked = step(trainer.loss, batches, models=trainer.models)
    masked = [gradient.clone() for gradient in masked]
    examples = [found["mask"][i] for i in range(len(found["mask"]))]
    kept = [[d for d in example if d.doc_features["ended"]] for example in examples]
    kept = [example for example in kept if example]
    _, wanted = step(trainer.loss, [collated(kept, [[i] for i in range(len(kept))])], models=trainer.models)
    for a, b in zip(masked, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_a_step_with_fewer_prompts_is_divided_by_its_own_items(online):  # noqa: F811
    """Prompts with equal rewards are skipped, and the divisor is that of the others (silent RL bug R9)."""
    rollout = {"zero_variance_groups": "skip", "rewards": [{"name": "regex", "pattern": ".*[a-f].*"}]}
    trainer = online(rollout=rollout)
    batches = next(trainer.train_loader.steps())[1]
    examples = trainer.train_loader.examples
    assert 0 < len(examples) < 4
    trainer.forward_backward(batches)
    found = [parameter.grad.clone() for parameter in trainer.policy.parameters()]
    made = [examples[i] for i in range(len(examples))]
    _, wanted = step(trainer.loss, [collated(made, [[i]]) for i in range(len(made))], models=trainer.models)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_gae_steps_over_what_the_environment_says():
    """Two sampled tokens, five of a tool, two sampled ones: the advantages of four sampled ones (silent RL bug R21)."""
    found = []
    for between in (0, 5):
        mask = [True, True, *[False] * between, True, True]
        cache = cache_of([[answer(2.0, mask=mask), answer(0.0, mask=mask)]], values=[1.0, 2.0, 3.0, 4.0] * 2)
        loss = create_loss("policy", advantage_estimator="gae", gamma=0.5, gae_lambda=0.5, whiten=False)
        add_features(loss, [cache])
        found.append(cache.token_features["advantages"][cache.mask.bool()].tolist())
    assert found[0] == found[1] and found[0][:4] == pytest.approx([-0.21875, -0.875, -1.5, -2.0])


def correction(logps: list[list[float]], **options) -> list[float]:
    """The weight of the first token of answers whose log-ratios of training to sampling are `logps`."""
    groups = [[answer(0.0, len(row)) for row in logps]]
    old = [x - 1.0 for row in logps for x in row]
    cache = cache_of(groups, old_logps=old)
    weights = importance_weights(cache, RolloutConfig(**options))
    return [weights[start + 2].item() for start in cache.offsets[:-1]]


def test_the_correction_of_a_token():
    """tis bounds the ratio from above, icepop drops what is outside of the bounds."""
    logps = [[0.1], [-3.0], [1.0], [90.0]]
    both = {"correction_level": "token"}
    exact = [float(np.exp(x)) for (x,) in logps]
    assert correction(logps, importance_correction="tis", **both) == pytest.approx([exact[0], exact[1], 2.0, 2.0])
    assert correction(logps, importance_correction="icepop", **both) == pytest.approx([exact[0], 0.0, 0.0, 0.0])


@pytest.mark.parametrize("kind", ["tis", "icepop"])
def test_the_correction_of_a_response_does_not_depend_on_its_length(kind):
    """It is the geometric mean: the same noise weighs 10 and 1,000 tokens alike (silent RL bug R4). Tokens of the
    environment have no part in it."""
    options = {"importance_correction": kind, "correction_level": "sequence"}
    weights = correction([[-0.2] * 10, [-0.2] * 1000, [0.3, -0.1], [-1.5] * 3], **options)
    low = float(np.exp(-1.5)) if kind == "tis" else 0.0
    assert weights == pytest.approx([*[float(np.exp(-0.2))] * 2, float(np.exp(0.1)), low], rel=1e-4)
    groups = [[answer(0.0, mask=[True, False, False, True])]]
    cache = cache_of(groups, old_logps=[-1.0, -1.4])
    cache.token_features["old_logps"][3:5] = 50.0
    cache.token_features["sample_logps"][3:5] = 0.0
    assert importance_weights(cache, RolloutConfig(**options))[2].item() == pytest.approx(np.exp(-0.2), rel=1e-4)


def test_metrics_of_the_mismatch():
    """Closed forms: differences 0, 0.5 and -3; the ratio exp(-3) is outside of [0.5, 2]."""
    cache = cache_of([[answer(0.0, 3)]], old_logps=[-1.0, -0.5, -4.0])
    found = mismatch_metrics(cache, RolloutConfig())
    ratio = np.exp([0.0, 0.5, -3.0])
    wanted = {"mismatch": 3.5 / 3, "mismatch/max": 3.0, "mismatch/outside": 1 / 3}
    assert found == pytest.approx(wanted | {"mismatch/ess": ratio.sum() ** 2 / (3 * (ratio**2).sum())}, rel=1e-6)
    same = mismatch_metrics(cache_of([[answer(0.0, 3)]], old_logps=[-1.0] * 3), RolloutConfig())
    assert same == {"mismatch": 0, "mismatch/max": 0, "mismatch/outside": 0, "mismatch/ess": 1}


def test_ratios_are_logged_only_where_they_can_differ_from_1(online):  # noqa: F811
    """A round of one step has no ratio, also if its KL is in the rewards; one of two steps has. The mismatch is always
    logged (silent RL bug R47)."""
    in_reward = {"name": "policy", "advantage_estimator": "reinforce++", "kl_coef": 0.1}
    for name, options, has_ratio in (
        ("one", {}, False),
        ("reward", {"loss": in_reward}, False),
        ("corrected", {"rollout": {"importance_correction": "tis"}}, False),
        ("two", {"total_batch_size": 2}, True),
    ):
        trainer = online(name, n_steps=1, **options)
        trainer.train()
        logged = trainer.train_metrics.keys() & {"ratio", "approx_kl", "clip_fraction/high", "clip_fraction/low"}
        assert (len(logged) == 4) if has_ratio else not logged
        assert 0 <= trainer.train_metrics["mismatch"] < 1e-4
