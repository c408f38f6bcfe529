"""Advantages and returns of rollouts against plain loops, and that nothing but the response has a part in them."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minitrain import DataError, create_loss, load_config
from minitrain.losses import add_features
from minitrain.losses.advantages import (
    ADVANTAGES,
    GROUPED,
    Rollouts,
    estimate,
    gae,
    kl_estimate,
    penalized_rewards,
    split_held_out,
    whiten,
)
from minitrain.losses.policy import PolicyOptions
from tests.messages import raises

COLUMNS = ("values", "old_logps", "ref_logps")


def file(rows: list[dict], source: str = "a.jsonl", garbage: float = 0.0) -> SimpleNamespace:
    """A data file of rollouts, each {"group", "reward", column: list of its response tokens, ...}.

    Before each stands a prompt of two tokens, whose places in the columns hold garbage.
    """
    names = [name for name in rows[0] if name not in ("group", "reward")]
    columns = {name: torch.tensor([x for row in rows for x in [garbage] * 2 + row[name]]).float() for name in names}
    mask = torch.tensor([x for row in rows for x in [0] * 2 + [1] * len(row[names[0]])], dtype=torch.uint8)
    offsets = np.cumsum([0, *(2 + len(row[names[0]]) for row in rows)])
    values = {name: np.array([row[name] for row in rows], np.float64) for name in ("group", "reward")}
    return SimpleNamespace(source=source, doc_features=values, token_features=columns, offsets=offsets, mask=mask)


def rollouts(sizes: tuple[int, ...] = (4, 1, 3, 6, 2, 2, 5), seed: int = 0) -> list[dict]:
    """One of each length; prompts 0, 1, 2, 0, 1, 2, 3: the last one's group is of one."""
    rng = np.random.default_rng(seed)
    made = []
    for i, n in enumerate(sizes):
        numbers = {name: rng.normal(size=n).astype(np.float32).tolist() for name in (*COLUMNS, "advantages", "returns")}
        made.append({"group": i % 3 if i < 6 else i, "reward": float(rng.normal()), **numbers})
    return made


def kept(given: SimpleNamespace, name: str) -> list[list[float]]:
    """A column at the response of each rollout."""
    starts, stops = given.offsets[:-1] + 2, given.offsets[1:]
    return [given.token_features[name][start:stop].tolist() for start, stop in zip(starts, stops)]


def plain(rows: list[dict], kind: str, gamma: float, lam: float, kl_coef: float = 0.0, scale: bool = True):
    """(advantages, returns) of each rollout, token by token from the formulas of docs/losses.md."""
    advantages, returns = [], []
    earned = []
    for row in rows:
        s = [-kl_coef * (p - q) for p, q in zip(row["old_logps"], row["ref_logps"])]
        s[-1] += row["reward"]
        earned.append(s)
    for row, s in zip(rows, earned):
        n, v = len(s), [*row["values"], 0.0]
        to_go = [sum(gamma ** (k - t) * s[k] for k in range(t, n)) for t in range(n)]
        others = [sum(e) for r, e in zip(rows, earned) if r["group"] == row["group"] and r is not row]
        if kind == "gae":
            deltas = [s[t] + gamma * v[t + 1] - v[t] for t in range(n)]
            a = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
            to_go = [x + y for x, y in zip(a, v)]
        elif kind == "reinforce++":
            a = to_go
        elif kind == "reinforce++-baseline":
            a = [sum(s) - (sum(others) + sum(s)) / (len(others) + 1)] * n
        elif kind == "rloo":
            a = [sum(s) - sum(others) / len(others) if others else 0.0] * n
        else:
            group = [*others, sum(s)]
            mean = sum(group) / len(group)
            spread = math.sqrt(sum((x - mean) ** 2 for x in group) / max(1, len(group) - 1))
            a = [((sum(s) - mean) / (spread + 1e-6) if scale else sum(s) - mean)] * n
        advantages.append(a)
        returns.append(to_go)
    return advantages, returns


def whitened(advantages: list[list[float]]) -> list[list[float]]:
    flat = np.concatenate(advantages)
    return [((np.array(a) - flat.mean()) / flat.std(ddof=1)).tolist() for a in advantages]


def close(found: list[list[float]], wanted: list[list[float]]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a == pytest.approx(b, rel=2e-5, abs=2e-6)


def test_gae_by_hand_on_four_tokens():
    """gamma 1/2, lambda 1/2, KL weight 1/10: the reward comes at the last token of the response, and what follows it
    is worth nothing, not the first value of the next rollout (trl#3750, silent RL bug R20).

    s = [-.1, 0, .2, 2 - .1]; V = [1, 2, 3, 4]; delta = s + V'/2 - V = [-.1, -.5, -.8, -2.1];
    A_4 = -2.1, A_3 = -.8 - 2.1/4 = -1.325, A_2 = -.5 - 1.325/4 = -.83125, A_1 = -.1 - .83125/4 = -.3078125.
    """
    row = {"group": 0, "reward": 2.0, "values": [1.0, 2.0, 3.0, 4.0]}
    row |= {"old_logps": [-1.0, -2.0, -3.0, -1.0], "ref_logps": [-2.0, -2.0, -1.0, -2.0]}
    given = file([row, {**row, "values": [9.0, 9.0, 9.0, 9.0]}])
    options = dict(advantage_estimator="gae", gamma=0.5, gae_lambda=0.5, kl_coef=0.1, whiten=False, vf_coef=0.1)
    add_features(create_loss("policy", **options), [given])
    want = [-0.3078125, -0.83125, -1.325, -2.1]
    assert kept(given, "advantages")[0] == pytest.approx(want)
    assert kept(given, "returns")[0] == pytest.approx([a + v for a, v in zip(want, row["values"])])
    assert not given.token_features["advantages"][given.mask == 0].any()


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("kind", ["gae", "reinforce++", "reinforce++-baseline", "grpo", "rloo"])
def test_advantages_equal_their_formulas(kind, whiten, kl_coef):
    """Over two files, whose rollouts of one prompt are one group; returns are those before whitening."""
    rows = rollouts()
    files = [file(rows[:4], "a.jsonl"), file(rows[4:], "b.jsonl")]
    options = {"gamma": 0.9} | ({"gae_lambda": 0.8} if kind == "gae" else {})
    options |= {"kl_coef": kl_coef, "kl_in": "reward"} if kl_coef else {}
    add_features(create_loss("policy", advantage_estimator=kind, whiten=whiten, vf_coef=0.1, **options), files)
    advantages, returns = plain(rows, kind, 0.9, 0.8, kl_coef)
    close(kept(files[0], "advantages") + kept(files[1], "advantages"), whitened(advantages) if whiten else advantages)
    close(kept(files[0], "returns") + kept(files[1], "returns"), returns)


def test_grpo_without_scaling():
    """scale_rewards=none leaves the deviation out (Dr. GRPO)."""
    given = file(rollouts())
    add_features(create_loss("policy", scale_rewards="none"), [given])
    close(kept(given, "advantages"), plain(rollouts(), "grpo", 1.0, 1.0, scale=False)[0])


def test_grpo_scaled_over_the_batch():
    """scale_rewards=batch: the mean is that of the group, the deviation that of all rewards, as in TRL; equal rewards
    give 0."""
    given = file(rollouts())
    add_features(create_loss("policy", scale_rewards="batch"), [given])
    spread = np.array([row["reward"] for row in rollouts()]).std(ddof=1)
    centered = plain(rollouts(), "grpo", 1.0, 1.0, scale=False)[0]
    close(kept(given, "advantages"), [[x / spread for x in row] for row in centered])
    same = file([row | {"reward": 0.95} for row in rollouts()])
    add_features(create_loss("policy", scale_rewards="batch"), [same])
    assert np.abs(np.concatenate(kept(same, "advantages"))).max() < 1e-8


@pytest.mark.parametrize(("old", "new"), [(True, "group"), (False, "none")])
def test_the_values_of_scale_rewards_of_older_versions(old, new, rows_file):
    base = {"model": {"name_or_path": "tiny"}, "datasets": [str(rows_file)]}
    config = load_config(base | {"loss": {"name": "policy", "scale_rewards": old}})
    assert create_loss(**config.loss).options.scale_rewards == PolicyOptions(scale_rewards=old).scale_rewards == new


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_estimators_of_kl(estimator):
    """Each is its formula; in the mean over p they all but k2 give KL(p || q), and k3 is never negative."""
    p, q = (torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).log_softmax(-1)
    d = p - q
    want = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() + d - 1}[estimator]
    torch.testing.assert_close(kl_estimate(d, estimator), want)
    if estimator != "k2":
        assert (p.exp() * kl_estimate(d, estimator)).sum().item() == pytest.approx((p.exp() * d).sum().item())
    assert estimator == "k1" or (kl_estimate(d, estimator) >= 0).all()


def test_the_default_penalty_is_k1_in_rewards_and_k3_in_the_loss():
    """PPO's and GRPO's; the place follows the advantages, and so does whitening."""
    found = [
        create_loss("policy", advantage_estimator=kind).options
        for kind in ("gae", "reinforce++", "reinforce++-baseline", "grpo", "rloo", "given")
    ]
    assert [o.kl_in for o in found] == ["reward", "reward", "loss", "loss", "loss", "loss"]
    assert [o.kl_estimator for o in found] == ["k1", "k1", "k3", "k3", "k3", "k3"]
    assert [o.whiten for o in found] == [True, True, True, False, False, False]


@pytest.mark.parametrize("garbage", [1e6, float("nan")])
@pytest.mark.parametrize("kind", [*ADVANTAGES])
def test_what_stands_outside_of_the_response_does_not_matter(kind, garbage):
    """1e6 or NaN there: advantages and returns are the same to the last bit, whitened or not (AReaL#1346)."""
    for white in (False, True):
        found = []
        for outside in (0.0, garbage):
            given = file(rollouts(), garbage=outside)
            options = {"kl_coef": 0.1, "kl_in": "reward"} if kind != "given" else {}
            add_features(create_loss("policy", advantage_estimator=kind, whiten=white, vf_coef=0.1, **options), [given])
            found.append([kept(given, name) for name in ("advantages", "returns")])
        assert found[0] == found[1] and np.isfinite(np.concatenate(found[1][0])).all()


def test_whitening_has_mean_0_and_deviation_1():
    """Over all tokens; equal numbers, and one alone, become 0 and not NaN."""
    numbers = whiten(torch.tensor([3.0, 5.0, 10.0, 2.0], dtype=torch.float64))
    assert numbers.mean().item() == pytest.approx(0, abs=1e-12) and numbers.std().item() == pytest.approx(1)
    assert not whiten(torch.full((3,), 7.0)).any() and whiten(torch.tensor([7.0])).tolist() == [0.0]


@pytest.mark.parametrize("kind", GROUPED)
def test_groups_of_one_and_of_equal_rewards_teach_nothing(kind):
    """Their advantages are 0; when no prompt has two rollouts, that is an error that names the file."""
    row = {"group": 0, "reward": 0.1, "values": [0.0, 0.0]}
    given = file([row, row, row, row | {"group": 1}])
    add_features(create_loss("policy", advantage_estimator=kind), [given])
    assert np.abs(kept(given, "advantages")).max() < 1e-6
    alone = file([row, row | {"group": 1}])
    with raises(DataError, "unsuitable-data", "a.jsonl: ", "reinforce++"):
        add_features(create_loss("policy", advantage_estimator=kind), [alone])
    add_features(
        create_loss("policy", advantage_estimator=kind), [file([row, row])], [alone]
    )  # to evaluate on, it may be


def test_files_to_evaluate_on_are_whitened_by_themselves():
    """But one that is held out of a file to train on is that file, and is prepared once."""
    train, held = file(rollouts(seed=0)), file(rollouts(seed=1))
    assert [len(files) for files in split_held_out([train], [train])] == [1]
    loss = create_loss("policy", advantage_estimator="reinforce++")
    add_features(loss, [train], [held, train])
    for given, seed in ((train, 0), (held, 1)):
        close(kept(given, "advantages"), whitened(plain(rollouts(seed=seed), "reinforce++", 1.0, 1.0)[0]))


def without(rows: list[dict], *names: str) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in names} for row in rows]


@pytest.mark.parametrize(
    ("options", "missing", "part"),
    [
        ({"advantage_estimator": "gae"}, ["values"], "values"),
        ({"advantage_estimator": "gae", "kl_coef": 0.1}, ["ref_logps"], "ref_logps"),
        ({"advantage_estimator": "reinforce++", "kl_coef": 0.1}, ["old_logps"], "old_logps"),
        ({"advantage_estimator": "given"}, ["advantages"], "loss.advantage_estimator=given needs advantages"),
        ({"advantage_estimator": "given", "vf_coef": 0.1}, ["returns"], "returns"),
    ],
)
def test_missing_columns(options, missing, part):
    """The error names the file and what to give; without that use, the column may be missing."""
    given = file(without(rollouts(), *missing), "b.jsonl")
    with raises(DataError, "invalid-row", "b.jsonl: ", part):
        add_features(create_loss("policy", **options), [given])
    add_features(create_loss("policy"), [given])


def test_missing_rewards_and_unlike_files():
    """A row without a reward; files of which one has a column that another has not."""
    rows = rollouts()
    rows[2]["reward"] = math.nan
    with raises(DataError, "invalid-row", "a.jsonl: 1 ", "reward", "loss.advantage_estimator=given"):
        add_features(create_loss("policy"), [file(rows)])
    add_features(create_loss("policy", advantage_estimator="given"), [file(rows)])
    files = [file(rollouts()), file(without(rollouts(), "old_logps"), "b.jsonl")]
    with raises(DataError, "mismatch", "b.jsonl", "a.jsonl", "old_logps"):
        add_features(create_loss("policy"), files)


def test_returns_of_the_value_loss():
    """The rows' own; else A + V where there are values; else what was earned from the token on (lambda 1)."""
    rows = rollouts()
    for missing, want in (
        ((), [row["returns"] for row in rows]),
        (("returns",), plain(rows, "gae", 0.9, 0.8)[1]),
        (("returns", "values"), plain(rows, "reinforce++", 0.9, 0.8)[1]),
    ):
        given = file(without(rows, *missing))
        add_features(create_loss("value", gamma=0.9, gae_lambda=0.8), [given])
        close(kept(given, "returns"), want)


def test_lambda_1_is_monte_carlo():
    """A + V with lambda 1 is what was earned, whatever the values say; lambda 0 looks one token ahead."""
    made = Rollouts([file(rollouts())])
    rewards, values = penalized_rewards(made, 0.0, "k1"), made.column("values", "this")
    want = estimate(made, rewards, "reinforce++", 0.9, 1.0, "none")[1]
    torch.testing.assert_close(gae(rewards, values, made.lengths, made.stops, 0.9, 1.0) + values, want)
    one_step = gae(rewards, values, made.lengths, made.stops, 0.9, 0.0)
    assert one_step[0].item() == pytest.approx((rewards[0] + 0.9 * values[1] - values[0]).item())
