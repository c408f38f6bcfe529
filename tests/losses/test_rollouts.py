"""policy and value against their formulas, and through the trainer: temperatures, references, value heads."""

import itertools
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from minitrain import ConfigError, DataError, create_loss
from minitrain.batch import Document, PolicyOutput, collate
from minitrain.distributed.parallel import SingleDevice
from minitrain.losses import LossOutput, Models
from minitrain.losses.advantages import ADVANTAGES
from minitrain.losses.value import value_metrics, with_explained_variance
from minitrain.model.tiny import tiny_tokenizer
from minitrain.training.aux_models import PrecomputedRefLogps
from minitrain.training.step import MetricAccumulator
from tests.conftest import metrics, weights
from tests.examples import LENGTHS, N, collated, prepared, step
from tests.messages import raises

EPS = {"clip_eps_low": 0.2, "clip_eps_high": 0.4}
CLIPS = {"cispo": {"clip_eps_high": 1.1}, "sapo": {}, "vespo": {}, "dr_grpo": EPS | {"max_new_tokens": 50}}
AGGREGATIONS = ("dapo", "grpo", "dr_grpo", "cispo", "sapo", "gmpo", "luspo", "vespo")


class Table:
    """A policy that gives these log-probabilities, entropies and values, whatever the batch says."""

    def __init__(self, logps, entropy=None, values=None):
        self.given = logps, entropy, values

    def __call__(self, batch, **asked) -> PolicyOutput:
        logps, entropy, values = self.given
        return PolicyOutput(logps, batch.target_docs, batch.n_docs, entropy, values=values)


@pytest.fixture
def drawn():
    """``drawn(loss)``: (batch in float64, [log-probabilities, entropies, values] that take gradients)."""

    def draw(loss):
        batch = collated(prepared(loss), [[i] for i in range(N)])
        batch.token_features = {name: column.double() for name, column in batch.token_features.items()}
        generator = torch.Generator().manual_seed(3)
        noise = torch.randn(3, batch.n_targets, generator=generator, dtype=torch.float64)
        logps = batch.target_feature("old_logps") + 0.4 * noise[0]
        return batch, [x.requires_grad_() for x in (logps, noise[1].abs(), noise[2])]

    return draw


def doc_feature(batch, *columns):
    """What belongs to each rollout: its tokens of each of the columns [N]."""
    for doc in range(batch.n_docs):
        yield [column[batch.target_docs == doc] for column in columns]


def plain(batch, logps, entropy, values, o: dict) -> torch.Tensor:
    """The loss of a whole step, rollout by rollout and token by token -> []."""
    names = ("old_logps", "ref_logps", "advantages", "values")
    columns = [batch.target_feature(name) for name in names]
    columns.append(batch.target_feature("returns") if o.get("vf_coef") else columns[3])
    weights = batch.target_feature("importance_weights") if "importance_weights" in batch.token_features else None
    columns.append(torch.ones_like(logps) if weights is None else weights)
    total, means, n_tokens, name = 0.0, 0.0, 0, o.get("loss_aggregation", "dapo")
    for lp, h, v, old, ref, a, v_old, r, weight in doc_feature(batch, logps, entropy, values, *columns):
        terms = 0.0
        for t in range(len(lp)):
            ratios = {"sequence": (lp - old).mean(), "product": (lp - old).sum()}
            level = "sequence" if name == "luspo" else o.get("importance_sampling_level")
            rho = ratios.get(level, lp[t] - old[t]).exp()
            if name == "cispo":
                term = -min(rho.item(), o["clip_eps_high"]) * a[t] * lp[t]
            elif name == "sapo":
                tau = o.get("sapo_temperature_pos", 1.0) if a[t] > 0 else o.get("sapo_temperature_neg", 1.05)
                term = -4 / tau / (1 + (-tau * (rho - 1)).exp()) * a[t]
            elif name == "gmpo":
                low, high = math.log(1 - o["clip_eps_low"]), math.log(1 + o["clip_eps_high"])
                each = [min(x, high) if g > 0 else max(x, low) for x, g in zip((lp - old).unbind(), a, strict=True)]
                term = -torch.as_tensor(sum(each) / len(each)).exp() * a[t]
            elif name == "vespo":
                k, decay, w = *((2, 3) if a[t] >= 0 else (3, 2)), ratios["product"].exp().item()
                term = -(w**k) * math.exp(decay * (1 - w)) * a[t] * lp[t]
            else:
                clipped = rho.clamp(1 - o["clip_eps_low"], 1 + o["clip_eps_high"])
                gain = torch.min(rho * a[t], clipped * a[t])
                if "dual_clip" in o and a[t] < 0:
                    gain = torch.max(gain, o["dual_clip"] * a[t])
                term = -gain
            term = weight[t] * term
            d = lp[t] - ref[t]
            kl = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() + d - 1}[o.get("kl_estimator", "k3")]
            term = term + o.get("kl_coef", 0.0) * (kl * rho if o.get("kl_times_ratio") else kl)
            term = term - o.get("entropy_coef", 0.0) * h[t]
            near = v_old[t] + (v[t] - v_old[t]).clamp(-0.2, 0.2)
            term = term + o.get("vf_coef", 0.0) * 0.5 * torch.max((v[t] - r[t]) ** 2, (near - r[t]) ** 2)
            terms = terms + term
        total, means, n_tokens = total + terms, means + terms / len(lp), n_tokens + len(lp)
    if name in ("grpo", "sapo", "gmpo"):
        return means / batch.n_docs
    units = {"dr_grpo": batch.n_docs * o.get("max_new_tokens", 1), "luspo": batch.n_docs}
    return total / units.get(name, n_tokens)


CASES = [
    {},
    {"loss_aggregation": "grpo"},
    {"loss_aggregation": "dr_grpo", "max_new_tokens": 50},
    {"loss_aggregation": "cispo", "clip_eps_high": 1.1},
    {"importance_sampling_level": "sequence", "loss_aggregation": "grpo", "clip_eps_high": 0.05, "clip_eps_low": 0.05},
    {"importance_sampling_level": "sequence", "advantage_estimator": "gae"},
    {"importance_sampling_level": "sequence", "loss_aggregation": "cispo", "clip_eps_high": 1.1},
    {"dual_clip": 1.3, "advantage_estimator": "rloo"},
    {"loss_aggregation": "sapo", "kl_coef": 0.2, "kl_estimator": "k2"},
    {"loss_aggregation": "sapo", "sapo_temperature_neg": 3.0, "importance_sampling_level": "sequence"},
    {"loss_aggregation": "gmpo", "advantage_estimator": "rloo"},
    {"loss_aggregation": "gmpo", "advantage_estimator": "reinforce++"},
    {"loss_aggregation": "luspo", "kl_coef": 0.2},
    {"loss_aggregation": "vespo", "advantage_estimator": "reinforce++-baseline"},
    *({"loss_aggregation": name, "entropy_coef": 0.1} for name in AGGREGATIONS),
    {
        "importance_sampling_level": "product",
        "loss_aggregation": "grpo",
        "advantage_estimator": "rloo",
    },  # RLOO as in TRL
    {"importance_sampling_level": "product", "kl_coef": 0.2, "kl_times_ratio": True},
    *({"kl_coef": 0.2, "kl_estimator": kind} for kind in ("k2", "k3")),
    *({"kl_coef": 0.2, "kl_estimator": kind, "kl_times_ratio": True} for kind in ("k1", "k2", "k3")),
    {
        "kl_coef": 0.2,
        "kl_times_ratio": True,
        "importance_sampling_level": "sequence",
        "loss_aggregation": "cispo",
        "clip_eps_high": 1.1,
    },
    {"kl_coef": 0.2, "entropy_coef": 0.1, "vf_coef": 0.3, "loss_aggregation": "grpo", "advantage_estimator": "given"},
    {"vf_coef": 0.1, "advantage_estimator": "gae", "loss_aggregation": "dr_grpo", "max_new_tokens": 30},
]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_policy_equals_its_formula(drawn, options, weighted):
    """Value and gradient in float64, with ratios on both sides of the clip. The weights of a correction multiply the
    surrogate of every aggregation, but no KL, entropy or value. The entropy is aggregated like the surrogate (silent RL
    bugs R5 and R42)."""
    options = CLIPS.get(options.get("loss_aggregation"), EPS) | options
    loss = create_loss("policy", **options)
    batch, inputs = drawn(loss)
    if weighted:
        generator = torch.Generator().manual_seed(4)
        made = torch.rand(batch.input_ids.shape, generator=generator, dtype=torch.float64)
        batch.token_features["importance_weights"] = 2 * made
    output = loss(batch, Models(Table(*inputs)))
    value = output.loss_sum / output.num_items
    want = plain(batch, *inputs, options)
    assert value.item() == pytest.approx(want.item(), rel=1e-6)
    kept = [x for x in inputs if x is inputs[0] or (options.get("entropy_coef") and x is inputs[1])]
    kept += [inputs[2]] if options.get("vf_coef") else []
    for a, b in zip(torch.autograd.grad(value, kept), torch.autograd.grad(want, kept)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    if options.get("loss_aggregation") not in ("cispo", "vespo"):  # whose weight is detached: no slope of its value
        assert torch.autograd.gradcheck(
            lambda *x: loss(batch, Models(Table(*x, *inputs[len(x) :]))).loss_sum, inputs[:1], eps=1e-6
        )


def test_the_clip_fraction_of_cispo(drawn):
    """The bound is clip_eps_high itself, for every advantage."""
    loss = create_loss("policy", loss_aggregation="cispo", clip_eps_high=1.1, advantage_estimator="given")
    batch, inputs = drawn(loss)
    total, n = loss(batch, Models(Table(*inputs))).metrics["clip_fraction/high"]
    ratio = (inputs[0] - batch.target_feature("old_logps")).exp()
    assert 0 < total == (ratio > 1.1).sum() < n
    assert ((ratio > 1.1) & (ratio < 2.1)).any()


def test_the_value_loss_equals_its_formula(drawn):
    """0.5 max((V - R)^2, (clip(V, V_old +- eps) - R)^2), value and slope; without V_old 0.5 (V - R)^2."""
    loss = create_loss("value", eps_value=0.3)
    batch, (_, _, values) = drawn(loss)
    old, returns = batch.target_feature("values"), batch.target_feature("returns")
    want = 0.0
    for v, o, r in zip(values.tolist(), old.tolist(), returns.tolist()):
        want += 0.5 * max((v - r) ** 2, (min(max(v, o - 0.3), o + 0.3) - r) ** 2)
    output = loss(batch, Models(Table(None, None, values)))
    assert output.loss_sum.item() == pytest.approx(want) and output.num_items == batch.n_targets
    assert torch.autograd.gradcheck(lambda x: loss(batch, Models(Table(None, None, x))).loss_sum, (values,), eps=1e-6)
    del batch.token_features["values"]
    free = loss(batch, Models(Table(None, None, values)))
    assert free.loss_sum.item() == pytest.approx(0.5 * ((values - returns) ** 2).sum().item())
    assert "value_clip_fraction" in output.metrics and "value_clip_fraction" not in free.metrics


@pytest.mark.parametrize("ratio", ["token", "sequence", "product"])
@pytest.mark.parametrize("normaliser", ["dapo", "grpo", "dr_grpo", "cispo"])
@pytest.mark.parametrize("sign", [1.0, 0.0, -1.0])
def test_a_far_off_token_has_the_gradient_of_the_clip(drawn, sign, normaliser, ratio):
    """One old_logp of -120 for a token of logp -3: exp(117) overflows float32. Its gradient is that of the formula in
    float64 wherever clipping ends it, 0 where nothing else bounds it (A < 0), and never NaN (trl#6637)."""
    clip = {"clip_eps_high": 5.0} if normaliser == "cispo" else EPS
    loss = create_loss(
        "policy", loss_aggregation=normaliser, importance_sampling_level=ratio, advantage_estimator="given", **clip
    )
    batch, (logps, entropy, _) = drawn(loss)
    doc = int(batch.docs_with_targets.numel() - 1)
    mine = batch.target_docs == doc  # all tokens of one rollout, so that the mean of its log-ratios is as far off
    far = mine if ratio == "sequence" else mine & (torch.arange(len(mine)) == int(mine.nonzero()[0]))
    places = batch.target_positions
    batch.token_features["old_logps"].flatten()[places[far]] = -120.0
    logps = torch.where(far, -3.0, logps.detach()).requires_grad_()
    batch.token_features["advantages"].flatten()[places[mine]] = sign
    exact = dict(clip, loss_aggregation=normaliser, importance_sampling_level=ratio) | {
        "max_new_tokens": loss.max_new_tokens
    }
    (want,) = torch.autograd.grad(plain(batch, logps, entropy, torch.zeros_like(logps), exact), logps)
    small = [x.detach().float().requires_grad_() for x in (logps, entropy)]
    batch.token_features = {name: column.float() for name, column in batch.token_features.items()}
    output = loss(batch, Models(Table(*small)))
    value = output.loss_sum / output.num_items
    (got,) = torch.autograd.grad(value, small[:1])
    assert torch.isfinite(value) and torch.isfinite(got).all()
    if sign < 0 and normaliser != "cispo":
        want[mine if ratio != "token" else far] = 0
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-7)
    metrics = {name: (total / weight).item() for name, (total, weight) in output.metrics.items()}
    assert all(map(math.isfinite, metrics.values()))
    n_bounded = (far if ratio == "token" else mine).sum().item()
    assert metrics["bounded_fraction"] == pytest.approx(n_bounded / batch.n_targets)


@pytest.mark.parametrize("name", ["sapo", "gmpo", "vespo"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_far_off_token_of_the_other_surrogates(drawn, sign, name):
    """The same old_logp of -120: value and gradient in float32 are finite, and those of the formula in float64."""
    clip = CLIPS.get(name, EPS)
    loss = create_loss("policy", loss_aggregation=name, advantage_estimator="given", **clip)
    batch, (logps, entropy, _) = drawn(loss)
    mine = batch.target_docs == batch.n_docs - 1
    far = int(mine.nonzero()[0])
    places = batch.target_positions
    batch.token_features["old_logps"].flatten()[places[far]] = -120.0
    batch.token_features["advantages"].flatten()[places[mine]] = sign
    logps = logps.detach().index_fill(0, torch.tensor(far), -3.0).requires_grad_()
    want = plain(batch, logps, entropy, torch.zeros_like(logps), clip | {"loss_aggregation": name})
    small = logps.detach().float().requires_grad_()
    batch.token_features = {key: column.float() for key, column in batch.token_features.items()}
    output = loss(batch, Models(Table(small, entropy.float())))
    found = output.loss_sum / output.num_items
    assert found.item() == pytest.approx(want.item(), rel=1e-3)
    (got,), (exact,) = torch.autograd.grad(found, small), torch.autograd.grad(want, logps)
    torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("times_ratio", [False, True])
def test_a_reference_100_nats_away_is_bounded(drawn, times_ratio):
    """k3 would be exp(100): that token has no gradient of the KL and is counted; the other tokens have theirs."""
    loss = create_loss("policy", kl_coef=0.2, kl_times_ratio=times_ratio, advantage_estimator="given", **EPS)
    batch, (logps, entropy, _) = drawn(loss)
    batch.token_features["advantages"].zero_()  # the KL alone
    options = EPS | {"kl_coef": 0.2, "kl_times_ratio": times_ratio}
    want = torch.autograd.grad(plain(batch, logps, entropy, torch.zeros_like(logps), options), logps)[0]
    small = [x.detach().float() for x in (logps, entropy)]
    small[0][4] = batch.target_feature("ref_logps")[4] - 100
    if times_ratio:  # whose own ratio is 1, so that only the KL is bounded
        batch.token_features["old_logps"].flatten()[batch.target_positions[4]] = small[0][4].item()
    batch.token_features = {name: column.float() for name, column in batch.token_features.items()}
    output = loss(batch, Models(Table(small[0].requires_grad_(), small[1])))
    (output.loss_sum / output.num_items).backward()
    got = small[0].grad.double()
    assert torch.isfinite(got).all() and math.isfinite(output.metrics["kl"][0])
    if not times_ratio:
        assert got[4] == 0
    got[4] = want[4] = 0
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    assert output.metrics["bounded_fraction"][0] == 1


def test_the_gradient_of_a_kl_in_the_loss_is_that_of_a_kl():
    """All three tokens of a vocabulary, weighted by their probability: k2, and k1 and k3 times the ratio, have the
    gradient of KL(p || q); k3 alone has that of KL(q || p). k1 alone has none at all, and is refused (NeMo-RL#2506)."""
    made = [[Document(torch.tensor([5, 6 + v]), torch.tensor([0, 1], dtype=torch.uint8))] for v in range(3)]
    q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    logits = torch.tensor([0.3, -0.4, 0.9], dtype=torch.float64, requires_grad=True)
    logps = logits.log_softmax(-1)
    for v, (document,) in enumerate(made):
        document.doc_features = {"reward": 0.0, "group": 0.0}
        columns = {"advantages": 0.0, "old_logps": logps[v].item(), "ref_logps": q[v].log().item()}
        document.token_features = {name: torch.tensor([0.0, x], dtype=torch.float64) for name, x in columns.items()}

    def expected(**options) -> torch.Tensor:
        loss = create_loss("policy", advantage_estimator="given", kl_coef=1.0, **options)
        output = loss(collate(made, 0), Models(Table(logps, torch.zeros(3))))
        (slopes,) = torch.autograd.grad(output.loss_sum, logps, retain_graph=True)
        return torch.autograd.grad((logps.detach().exp() * slopes * logps).sum(), logits, retain_graph=True)[0]

    p = logps.exp()
    (want,) = torch.autograd.grad((p * (logps - q.log())).sum(), logits, retain_graph=True)
    (backward,) = torch.autograd.grad(-(q * logps).sum(), logits, retain_graph=True)
    torch.testing.assert_close(expected(kl_estimator="k2"), want)
    for kind in ("k1", "k3"):
        torch.testing.assert_close(expected(kl_estimator=kind, kl_times_ratio=True), want)
    torch.testing.assert_close(expected(), backward)
    with raises(ConfigError, "conflict", "loss.kl_estimator: "):
        expected(kl_estimator="k1")


@pytest.mark.parametrize("mean", [0.0, 1e3, -3e4])
def test_the_explained_variance_of_large_returns(mean):
    """Returns around a mean that is large, in float32 and uneven micro-batches: as numpy has it in float64."""
    noise = torch.randn(2, 2000, generator=torch.Generator().manual_seed(0))
    returns = mean + noise[0]
    values = returns + 0.5 * noise[1]
    r, v = returns.double().numpy(), values.double().numpy()
    for old in (None, values):
        totals = MetricAccumulator(torch.device("cpu"))
        for part in torch.arange(2000).split([1, 1200, 799]):
            metrics = value_metrics(values[part], returns[part], None if old is None else old[part], 0.2)
            totals.add(LossOutput(torch.zeros(()), torch.ones(()), metrics))
        found = with_explained_variance(totals.means(SingleDevice(torch.device("cpu"))))
        assert found["explained_variance"] == pytest.approx(1 - (r - v).var() / r.var(), rel=1e-6)
        assert found["value"] == pytest.approx(v.mean(), rel=1e-9) and found["return"] == pytest.approx(r.mean())


def test_without_old_log_probabilities_the_ratio_is_1(drawn):
    """The gradient is that of -A log p. A ratio of 1 by construction and its clipping are not logged (silent RL bug
    R47)."""
    loss = create_loss("policy")
    batch, inputs = drawn(loss)
    batch.token_features = {"advantages": batch.token_features["advantages"]}
    output = loss(batch, Models(Table(*inputs)))
    (gradient,) = torch.autograd.grad(output.loss_sum, inputs[:1])
    torch.testing.assert_close(gradient, -batch.target_feature("advantages"))
    found = {name: (total / weight).item() for name, (total, weight) in output.metrics.items()}
    assert not {"ratio", "approx_kl", "clip_fraction/high", "clip_fraction/low"} & found.keys()


def test_metrics_of_the_policy(drawn):
    """Each figure of docs/metrics.md by its definition; explained variance is that of all tokens in any batches."""
    loss = create_loss("policy", advantage_estimator="gae", vf_coef=0.1, **EPS)
    batch, (logps, entropy, values) = drawn(loss)
    found = {
        n: total.item() / w.item()
        for n, (total, w) in loss(batch, Models(Table(logps, entropy, values))).metrics.items()
    }
    found = loss.finalize_metrics(found)
    old, ref, a, r = (batch.target_feature(n) for n in ("old_logps", "ref_logps", "advantages", "returns"))
    with torch.no_grad():
        rho, d = (logps - old).exp(), logps - ref
        want = {
            "ratio": rho.mean(),
            "clip_fraction/high": ((rho > 1.4) & (a > 0)).double().mean(),
            "clip_fraction/low": ((rho < 0.8) & (a < 0)).double().mean(),
            "approx_kl": (rho - 1 - rho.log()).mean(),
            "entropy": entropy.mean(),
            "advantage": a.mean(),
            "kl": d.mean(),
            "logps/positive": logps[a > 0].mean(),
            "logps/negative": logps[a < 0].mean(),
            "reward": batch.doc_feature("reward").mean(),
            "value": values.mean(),
            "return": r.mean(),
            "explained_variance": 1 - (r - values).var(unbiased=False) / r.var(unbiased=False),
            "value_clip_fraction": ((values - batch.target_feature("values")).abs() > 0.2).double().mean(),
        }
    assert want["clip_fraction/high"] > 0.02 and want["clip_fraction/low"] > 0.02
    assert {n: found.get(n) for n in want} == pytest.approx({n: x.item() for n, x in want.items()}, rel=1e-5, abs=1e-6)
    assert found.keys() - want.keys() == {"value_loss", "bounded_fraction"} and found["bounded_fraction"] == 0


@pytest.mark.parametrize("scale", [0.0, 30.0, 1e4])
def test_the_entropy_is_that_of_the_whole_distribution(scale):
    """Not the -(p log p) of sampled tokens: a policy that finds all of 260 tokens alike has log 260, and no policy has
    more, or less than 0. Padding has no part in it (silent RL bug R41)."""
    from tests.examples import policy_for

    loss = create_loss("policy")
    made, policy = prepared(loss), policy_for(loss)
    head = policy.model.get_output_embeddings().weight
    head.data.mul_(scale)
    total, weight = loss(collated(made, [[i] for i in range(N)]), Models(policy)).metrics["entropy"]
    each = [loss(collated(made, [[i]]), Models(policy)).metrics["entropy"] for i in range(N)]  # without padding
    assert all(-1e-6 <= (one / n).item() <= math.log(len(head)) + 1e-6 for one, n in each)
    assert total.item() == pytest.approx(sum(one.item() for one, _ in each), rel=1e-5, abs=1e-5)
    if not scale:
        assert (total / weight).item() == pytest.approx(math.log(len(head)), rel=1e-6)


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_kl_coef_has_an_effect_with_every_estimator(kind):
    """In the loss, and in the rewards unless the advantages are given; the two differ (silent RL bugs R24 and R26)."""
    found = {}
    for place in ("none", "loss", *(("reward",) if kind != "given" else ())):
        options = {"kl_coef": 0.5, "kl_in": place} if place != "none" else {}
        loss = create_loss("policy", advantage_estimator=kind, **options)
        found[place] = step(loss, [collated(prepared(loss), [[i] for i in range(N)])])[1]
    for a, b in itertools.combinations(found, 2):
        largest = max(gradient.abs().max() for gradient in found[a])
        assert max((x - y).abs().max() for x, y in zip(found[a], found[b])) > 1e-3 * largest, (a, b)


def test_units_of_the_normalisers():
    """Tokens, rollouts, or rollouts times the longest there could be: of the training files when it is left out."""
    n_tokens = sum(length - max(1, length // 4) for length in LENGTHS)
    longest = max(length - max(1, length // 4) for length in LENGTHS)
    for options, want in (
        ({}, n_tokens),
        ({"loss_aggregation": "cispo"}, n_tokens),
        ({"loss_aggregation": "vespo"}, n_tokens),
        *(({"loss_aggregation": name}, N) for name in ("grpo", "sapo", "gmpo", "luspo")),
        ({"loss_aggregation": "dr_grpo"}, N * longest),
        ({"loss_aggregation": "dr_grpo", "max_new_tokens": 100}, N * 100),
    ):
        loss = create_loss("policy", **options)
        assert loss.num_items(collated(prepared(loss), [[i] for i in range(N)])) == want
        assert loss.num_items(collate([], 0)) == 0


def test_defaults_of_the_clip():
    """0.28 with dapo, 5 with cispo, else that below."""
    cases = (
        {"loss_aggregation": "dapo", "clip_eps_low": 0.1},
        {"loss_aggregation": "cispo"},
        {"loss_aggregation": "grpo", "clip_eps_low": 0.1},
    )
    assert [create_loss("policy", **options).options.clip_eps_high for options in cases] == [0.28, 5.0, 0.1]


# ----------------------------------------------------------------------------------------------- through the trainer


def rows(**columns) -> list[dict]:
    """24 rollouts of token ids, four of each prompt; columns are made from the number of tokens of the response."""
    made = []
    for i in range(24):
        n = 2 + i * 5 % 9
        row = {"prompt_ids": [5, 6, 7 + i // 4], "response_ids": [10 + (i + k) % 40 for k in range(n)], "reward": i % 4}
        made.append(row | {name: make(n) for name, make in columns.items()})
    return made


@pytest.fixture
def train(make_trainer, tmp_path):
    """``train(rows, "loss.name=value", ...)``: a trainer over these rollouts."""

    def make(given: list[dict], *overrides: str, **hooks):
        file = tmp_path / "rollouts.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in given))
        overrides = overrides if any("loss.name" in o for o in overrides) else ("loss.name=policy", *overrides)
        return make_trainer(f"datasets=[{file}]", *overrides, **hooks)

    return make


def sampled(folder, temperature: float) -> list[dict]:
    """Rows with the log-probabilities that transformers gives them at a temperature."""
    model, made = AutoModelForCausalLM.from_pretrained(folder), rows()
    for row in made:
        ids, start = torch.tensor(row["prompt_ids"] + row["response_ids"]), len(row["prompt_ids"])
        with torch.no_grad():
            logps = (model(ids[None]).logits[0, :-1] / temperature).log_softmax(-1)
        row["old_logps"] = logps.gather(1, ids[1:, None])[start - 1 :, 0].tolist()
    return made


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("packing", ["true", "false"])
def test_the_sampling_temperature_gives_ratio_1(train, llama_folder, packing, ratio):
    """Sampled at 0.6 from the same weights: the ratio is 1 for every token, with dropout in the model too, and at
    another temperature it is not (trl#3029)."""
    given = sampled(llama_folder, 0.6)
    settings = (
        "n_steps=1",
        f"packing={packing}",
        f"loss.importance_sampling_level={ratio}",
        "loss.clip_eps_low=1e-4",
        "loss.clip_eps_high=1e-4",
    )
    trainer = train(given, "loss.temperature=0.6", *settings)
    for module in trainer.policy.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    trainer.train()
    (line,) = metrics(trainer)
    assert line["ratio"] == pytest.approx(1, abs=1e-5) and line["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert line["clip_fraction/high"] == line["clip_fraction/low"] == 0
    trainer = train(given, *settings, "exp_name=other")
    trainer.train()
    assert metrics(trainer)[0]["approx_kl"] > 1e-3


@pytest.mark.parametrize("lora", ["lora.rank=0", "lora.rank=4"])
def test_all_references_are_the_policy_at_the_start(train, lora):
    """Second model, first values and noted log-probabilities, at temperature 0.7: KL 0 at first, then the same."""
    found = []
    for kind in ("model", "adapter", "precomputed"):
        settings = ("loss.kl_coef=0.5", f"loss.reference={kind}", "loss.temperature=0.7", lora, f"exp_name={kind}")
        trainer = train(rows(), *settings, "packing=true")
        trainer.train()
        lines = metrics(trainer)
        assert lines[0]["kl"] == pytest.approx(0, abs=1e-6) and lines[2]["kl"] > 1e-4
        found.append((lines[2]["kl"], weights(trainer)))
    for kl, other in found[1:]:
        assert kl == pytest.approx(found[0][0], rel=1e-3)
        for name, tensor in found[0][1].items():
            torch.testing.assert_close(other[name], tensor, rtol=2e-3, atol=2e-5)


def test_log_probabilities_of_the_rows_take_the_place_of_a_reference(train):
    """ref_logps in the file: no second model, and the KL is to them."""
    trainer = train(rows(ref_logps=lambda n: [-6.0] * n), "loss.kl_coef=0.1", "n_steps=1")
    assert isinstance(trainer.models.reference, PrecomputedRefLogps) and trainer.loss.requires == {"reference"}
    trainer.train()
    assert metrics(trainer)[0]["kl"] > 0
    assert "kl" not in metrics(_trained(train(rows(), "n_steps=1", "exp_name=none")))[0]


def _trained(trainer):
    trainer.train()
    return trainer


def test_one_far_off_token_does_not_cost_the_step(train):
    """An old_logp of -120 in a file: every step is taken, its figures are finite, and the token is counted."""
    given = rows(old_logps=lambda n: [-5.0] * n)
    for row in given[:2]:
        row["old_logps"][0] = -120.0
    trainer = train(given, "loss.kl_coef=0.1", "total_batch_size=24", "n_steps=2")
    before = weights(trainer)
    lines = metrics(_trained(trainer))
    assert trainer.updates == 2 and all(isinstance(x, (int, float, str)) for line in lines for x in line.values())
    assert not any(value in ("nan", "inf") for line in lines for value in line.values())
    n_tokens = sum(len(row["response_ids"]) for row in given)
    assert lines[0]["bounded_fraction"] == pytest.approx(2 / n_tokens)
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(trainer).items())


@pytest.mark.parametrize("how", ["too long", "mask_truncated"])
def test_what_is_not_trained_on_counts_in_the_mean_of_its_group(train, how):
    """Of four answers to a prompt the two that fail go on beyond max_length, or were cut off in sampling: the others
    have the advantages that they have among four, and there are half as many examples (open-instruct#1794)."""
    end = tiny_tokenizer().eos_token_id
    given = []
    for i in range(24):
        tail = [end] if i % 4 < 2 or how == "too long" else []
        length = 30 if i % 4 >= 2 and how == "too long" else 3
        response = [10 + (i + k) % 40 for k in range(length)] + tail
        given.append({"prompt_ids": [5, 6, 7 + i // 4], "response_ids": response, "reward": float(i % 4 < 2)})
    option = "max_length=20" if how == "too long" else "mask_truncated=true"
    trainer = train(given, option, "n_steps=1", "total_batch_size=24", "loss.scale_rewards=false")
    assert len(trainer.train_loader.examples) == 12
    (cache,) = trainer.train_loader.examples.caches
    assert cache.counts == {"long-rollouts" if how == "too long" else "truncated-rollouts": 12}
    (line,) = metrics(_trained(trainer))
    assert line["advantage"] == pytest.approx(0.5) and line["reward"] == 1
    whole = train(given, "n_steps=1", "total_batch_size=24", "loss.scale_rewards=false", "exp_name=whole")
    (line,) = metrics(_trained(whole))
    assert line["reward"] == 0.5 and len(whole.train_loader.examples) == 24


def test_rewarded_answers_become_likelier(train):
    """From nothing but rewards; the others become unlikelier."""
    lines = metrics(_trained(train(rows(), "n_steps=12", "lr=3e-3")))
    assert lines[-1]["logps/positive"] > lines[0]["logps/positive"] + 0.3
    assert lines[-1]["logps/negative"] < lines[0]["logps/negative"]


def test_rows_may_bring_their_own_advantages(train):
    """Rewards are then no more than a figure, of the rows that have one."""
    given = rows(advantages=lambda n: [0.5] * n)
    for row in given[::2]:
        del row["reward"]
    (line,) = metrics(_trained(train(given, "loss.advantage_estimator=given", "n_steps=1", "total_batch_size=24")))
    assert line["advantage"] == pytest.approx(0.5) and line["loss"] == pytest.approx(-0.5)
    assert line["reward"] == pytest.approx(sum(row["reward"] for row in given[1::2]) / 12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_value_head_is_saved_and_goes_on(train, dtype):
    """The head beside a policy is trained, saved with the model, and what the next run starts from."""
    settings = ("loss.vf_coef=0.5", "loss.advantage_estimator=reinforce++", f"model.policy_dtype={dtype}")
    trainer = _trained(train(rows(), *settings, "n_steps=6", "validation_split=4"))
    head = trainer.policy.value_head
    assert head.weight.any() and {"value_loss", "explained_variance"} <= trainer.eval_metrics.keys()
    assert (trainer.run.final / "value_head.safetensors").is_file()
    again = train(rows(), *settings, f"model.name_or_path={trainer.run.final}", "exp_name=again")
    assert torch.equal(again.policy.value_head.weight, head.weight) and torch.equal(
        again.policy.value_head.bias, head.bias
    )
    AutoModelForCausalLM.from_pretrained(trainer.run.final)


def test_a_value_head_beside_an_adapter_goes_on(train):
    """It lies in the adapter's folder, and is found there."""
    settings = ("loss.vf_coef=0.5", "loss.advantage_estimator=reinforce++")
    trainer = _trained(train(rows(), *settings, "lora.rank=4"))
    again = train(rows(), *settings, f"model.adapter={trainer.run.final}", "exp_name=again")
    assert trainer.policy.value_head.weight.any()
    assert torch.equal(again.policy.value_head.weight, trainer.policy.value_head.weight)


def test_a_value_model_is_loaded_by_transformers(train):
    """final/ is an AutoModelForSequenceClassification of one label: what it says of a prompt is our value of its next
    token. It learns to tell the returns of rollouts, and starts the next run."""
    trainer = train(rows(), "loss.name=value", "n_steps=60", "total_batch_size=24", "lr=5e-3", "loss.gamma=0.9")
    assert not trainer.policy.training  # dropout is off
    trainer.train()
    lines = metrics(trainer)
    assert lines[-1]["explained_variance"] > 0.5 > 0.2 > lines[0]["explained_variance"]
    model = AutoModelForSequenceClassification.from_pretrained(trainer.run.final).eval()
    assert model.config.num_labels == 1
    batch = collate([trainer.train_loader.examples[5]], 0)
    values = trainer.policy.eval()(batch).values  # [n]
    ids, start = batch.input_ids, int((batch.labels[0] >= 0).long().argmax())
    theirs = [model(input_ids=ids[:, :end]).logits[0, 0] for end in range(start, ids.shape[1])]
    torch.testing.assert_close(values, torch.stack(theirs), rtol=1e-4, atol=1e-5)
    again = train(rows(), "loss.name=value", f"model.name_or_path={trainer.run.final}", "exp_name=again")
    torch.testing.assert_close(again.policy.eval()(batch).values, values)


def test_a_value_model_is_no_encoder(train, tmp_path):
    """A model that sees the whole answer at each of its tokens has nothing to foretell."""
    from transformers import BertConfig, BertForSequenceClassification

    from minitrain.model.tiny import tiny_tokenizer

    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertForSequenceClassification(BertConfig(vocab_size=260, num_labels=1, **shape)).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    with raises(ConfigError, "conflict", "loss.name: "):
        train(rows(), "loss.name=value", f"model.name_or_path={tmp_path / 'bert'}").train()


def test_evaluation_does_not_depend_on_the_batch_size(train):
    """Every figure of an evaluation, those that are no means too; a held-out file has columns like the others'."""
    given = rows(old_logps=lambda n: [-5.0] * n, values=lambda n: [0.5] * n)
    found = []
    for size in (1, 3, 8):
        settings = (
            "loss.advantage_estimator=gae",
            "loss.vf_coef=0.1",
            "loss.loss_aggregation=grpo",
            f"eval_batch_size={size}",
        )
        trainer = train(given, *settings, "validation_split=8", "n_steps=1", f"exp_name=size-{size}")
        found.append({k: v for k, v in _trained(trainer).eval_metrics.items() if k != "seconds"})
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        (["loss.gae_lambda=0.5"], "no-effect", "loss.gae_lambda: "),
        (["loss.gamma=0.5"], "no-effect", "loss.gamma: "),
        (["loss.advantage_estimator=rloo", "loss.scale_rewards=false"], "no-effect", "loss.scale_rewards: "),
        (["loss.max_new_tokens=5"], "no-effect", "loss.max_new_tokens: "),
        (["loss.sapo_temperature_pos=2"], "no-effect", "loss.sapo_temperature_pos: "),
        (["loss.loss_type=sapo", "loss.vespo_k_neg=2"], "no-effect", "loss.vespo_k_neg: "),
        (["loss.loss_type=sapo", "loss.epsilon=0.1"], "no-effect", "loss.clip_eps_low: "),
        (["loss.loss_type=vespo", "loss.ratio=token"], "no-effect", "loss.importance_sampling_level: "),
        (["loss.loss_type=gmpo", "loss.dual_clip=3"], "no-effect", "loss.dual_clip: "),
        (["loss.scale_rewards=bach"], "not-a-choice", "Did you mean batch"),
        (["loss.loss_aggregation=cispo", "loss.dual_clip=3"], "no-effect", "loss.dual_clip: "),
        (["loss.kl_estimator=k1"], "no-effect", "loss.kl_estimator: "),
        (["loss.kl_coef=1", "loss.kl_estimator=k1"], "conflict", "loss.kl_estimator: "),
        (["loss.kl_times_ratio=true"], "no-effect", "loss.kl_times_ratio: "),
        (
            ["loss.advantage_estimator=gae", "loss.kl_coef=1", "loss.kl_times_ratio=true"],
            "no-effect",
            "loss.kl_in=loss",
        ),
        (["truncation=end"], "no-effect", ": truncation: "),
        (["loss.name=sft", "mask_truncated=true"], "no-effect", ": mask_truncated: "),
        (["loss.reference=model"], "no-effect", "loss.reference: "),
        (["loss.advantage_estimator=gae", "loss.kl_coef=1", "loss.reference=model"], "no-effect", "loss.reference: "),
        (["loss.advantage_estimator=given", "loss.kl_coef=1", "loss.kl_in=reward"], "no-effect", "loss.kl_in: "),
        (["loss.eps_value=1"], "no-effect", "loss.eps_value: "),
        (["loss.advantage_estimator=gea"], "not-a-choice", "Did you mean gae"),
        (["loss.name=value", "loss.kl_estimator=k3"], "no-effect", "loss.kl_estimator: "),
        (["eval_generate.n_examples=2", "validation_split=2"], "conflict", ": eval_generate: "),
    ],
)
def test_options_that_would_be_ignored(train, options, code, part):
    """They are refused by name, before anything is read."""
    with raises(ConfigError, code, part):
        train(rows(), *options)


def test_bad_data_end_before_a_model_is_read(train, monkeypatch):
    """A missing column is told with the file's name, and no model is loaded for it."""
    monkeypatch.setattr("minitrain.training.setup.build_policy", lambda *args, **kwargs: pytest.fail("loaded"))
    with raises(DataError, "invalid-row", "rollouts.jsonl: ", "values"):
        train(rows(), "loss.advantage_estimator=gae")
    with raises(DataError, "unsuitable-data", "rollouts.jsonl: "):
        train(rows()[::4])
    with raises(DataError, "invalid-row", "rollouts.jsonl: 24 ", "reward"):
        train([row | {"advantages": 1.0} for row in ({k: v for k, v in r.items() if k != "reward"} for r in rows())])
