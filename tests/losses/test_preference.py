"""dpo with its variants, kto and pairwise against their formulas, and what they are compared with."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from minitrain import ConfigError, create_loss
from minitrain.batch import PolicyOutput, collate
from minitrain.losses import Models
from minitrain.losses.dpo import VARIANTS
from tests.conftest import metrics, weights
from tests.examples import N, collated, examples, prepared
from tests.messages import raises, reports

BETA = 0.3
OWN = {  # options of one variant, as `plain` has them
    "simpo": {"gamma": 0.7},
    "cpo": {"alpha": 0.5},
    "alphapo": {"gamma": 0.7, "alphapo_alpha": 0.4},
    "discopop": {"discopop_tau": 0.2},
}
SORTED = ("aot", "aot_unpaired")


def sig(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def logsig(x: float) -> float:
    return -math.log1p(math.exp(-x))


def plain(variant: str, w: float, l: float, rw: float, rl: float, nw: int, nl: int, e: float) -> float:  # noqa: E741
    """The loss of one pair from summed log-probabilities (w chosen, l rejected, r reference) and lengths."""
    r_w, r_l = w - rw, l - rl
    d = r_w - r_l
    mean_d = r_w / nw - r_l / nl
    m_w, m_l = w / nw, l / nl
    shaped_w, shaped_l = shaped(m_w), shaped(m_l)
    mixed = sig(BETA * d / 0.2)
    odds = m_w - m_l - (math.log(1 - math.exp(m_w)) - math.log(1 - math.exp(m_l)))
    if variant == "exo_pair":
        e = e or 1e-3
        p = sig(BETA * d)
        return p * (math.log(p) - math.log(1 - e)) + (1 - p) * (math.log(1 - p) - math.log(e))
    return {
        "sigmoid": -(1 - e) * logsig(BETA * d) - e * logsig(-BETA * d),
        "ipo": (mean_d - 1 / (2 * BETA)) ** 2,
        "hinge": max(0.0, 1 - BETA * d),
        "robust": (-(1 - e) * logsig(BETA * d) + e * logsig(-BETA * d)) / (1 - 2 * e),
        "nca_pair": -logsig(BETA * r_w) - 0.5 * logsig(-BETA * r_w) - 0.5 * logsig(-BETA * r_l),
        "bco_pair": -logsig(BETA * r_w) - logsig(-BETA * r_l),
        "sppo_hard": (r_w - 0.5 / BETA) ** 2 + (r_l + 0.5 / BETA) ** 2,
        "apo_zero": 1 - sig(BETA * r_w) + sig(BETA * r_l),
        "apo_down": sig(BETA * r_w) + 1 - sig(BETA * d),
        "sigmoid_norm": -logsig(BETA * mean_d),
        "simpo": -logsig(BETA * (m_w - m_l) - 0.7),
        "alphapo": -logsig(BETA * (shaped_w - shaped_l) - 0.7),
        "discopop": -(1 - mixed) * logsig(BETA * d) + mixed * math.exp(-BETA * d),
        "orpo": -m_w - BETA * logsig(odds),
        "cpo": -logsig(BETA * (w - l)) - 0.5 * m_w,
    }[variant]


def shaped(m: float) -> float:
    """The reward of AlphaPO."""
    return (1 - math.exp(m) ** -0.4) / 0.4


def plain_sum(variant: str, pairs: list[tuple[float, ...]], e: float) -> float:
    """The loss of pairs (w, l, rw, rl, nw, nl), by a loop."""
    if variant not in SORTED:
        return sum(plain(variant, *pair, e) for pair in pairs)
    above = sorted(w - l if variant == "aot" else w - rw for w, l, rw, rl, *_ in pairs)  # noqa: E741
    below = sorted(rw - rl if variant == "aot" else l - rl for w, l, rw, rl, *_ in pairs)  # noqa: E741
    return sum(-(1 - e) * logsig(BETA * (a - b)) - e * logsig(BETA * (b - a)) for a, b in zip(above, below))


class Table:
    """A policy that gives the log-probabilities it was made with, whatever the batch says."""

    def __init__(self, logps: torch.Tensor):
        self.logps = logps

    def __call__(self, batch, **asked) -> PolicyOutput:
        return PolicyOutput(self.logps, batch.target_docs, batch.n_docs)


@pytest.fixture
def pairs():
    """(batch of pairs, log-probabilities of the policy, of the reference)"""
    batch = collated(examples("preference"), [[i] for i in range(N)])
    generator = torch.Generator().manual_seed(3)
    draw = [-torch.rand(batch.n_targets, generator=generator, dtype=torch.float64) for _ in range(2)]
    return batch, draw[0].requires_grad_(), draw[1]


def of_pairs(batch, logps: torch.Tensor) -> list[tuple[float, float]]:
    """Summed (chosen, rejected) of each pair, by a plain loop."""
    sums = [0.0] * batch.n_docs
    for doc, value in zip(batch.target_docs.tolist(), logps.tolist()):
        sums[doc] += value
    return list(zip(sums[::2], sums[1::2]))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_their_formulas(pairs, variant, smoothing):
    """Each pair's loss is the formula of docs/losses.md in float64, and the gradient is its slope (gradcheck)."""
    batch, logps, ref = pairs
    smooth = {"label_smoothing": smoothing} if variant in ("sigmoid", "robust", "exo_pair", *SORTED) else {}
    loss = create_loss("dpo", variant=variant, beta=BETA, **smooth, **OWN.get(variant, {}))
    counts = of_pairs(batch, torch.ones_like(ref))
    sides = zip(of_pairs(batch, logps.detach()), of_pairs(batch, ref), counts)
    want = plain_sum(variant, [(*pi, *pr, *n) for pi, pr, n in sides], smoothing)
    output = loss(batch, Models(Table(logps), Table(ref) if "reference" in loss.requires else None))
    assert output.loss_sum.item() == pytest.approx(want, rel=1e-9) and output.num_items == N
    reference = Table(ref) if "reference" in loss.requires else None
    assert torch.autograd.gradcheck(
        lambda x: loss(batch, Models(Table(x), reference)).loss_sum, (logps,), eps=1e-6, atol=1e-5
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_means_are_taken_once(pairs, variant):
    """average_log_prob gives the formula of means for every variant, and changes nothing where means are taken anyway:
    never a mean divided by the length again."""
    batch, logps, ref = pairs
    loss = create_loss("dpo", average_log_prob=True, beta=BETA, variant=variant, **OWN.get(variant, {}))
    sides = zip(of_pairs(batch, logps.detach()), of_pairs(batch, ref), of_pairs(batch, torch.ones_like(ref)))
    want = plain_sum(variant, [(w / n, l / m, rw / n, rl / m, 1, 1) for (w, l), (rw, rl), (n, m) in sides], 0.0)  # noqa: E741
    reference = Table(ref) if "reference" in loss.requires else None
    assert loss(batch, Models(Table(logps), reference)).loss_sum.item() == pytest.approx(want, rel=1e-9)


def test_other_options_of_dpo(pairs):
    """ipo over sums, means instead of sums, no reference, and the chosen answer's likelihood beside the loss."""
    batch, logps, ref = pairs
    ours, theirs, counts = (of_pairs(batch, t) for t in (logps.detach(), ref, torch.ones_like(ref)))

    def value(**options) -> float:
        return create_loss("dpo", beta=BETA, **options)(batch, Models(Table(logps), Table(ref))).loss_sum.item()

    deltas = [(w - rw) - (l - rl) for (w, l), (rw, rl) in zip(ours, theirs)]  # noqa: E741
    assert value(variant="ipo", ipo_sums=True) == pytest.approx(sum((d - 0.5 / BETA) ** 2 for d in deltas))
    means = [(w - rw) / n - (l - rl) / m for (w, l), (rw, rl), (n, m) in zip(ours, theirs, counts)]  # noqa: E741
    assert value(average_log_prob=True) == pytest.approx(sum(-logsig(BETA * d) for d in means))
    nll = sum(-w / n for (w, _), (n, _) in zip(ours, counts))
    assert value(sft_weight=0.5) == pytest.approx(sum(-logsig(BETA * d) for d in deltas) + 0.5 * nll)
    free = create_loss("dpo", beta=BETA, reference_free=True)
    assert free.requires == frozenset()
    want = sum(-logsig(BETA * (w - l)) for w, l in ours)  # noqa: E741
    assert free(batch, Models(Table(logps))).loss_sum.item() == pytest.approx(want)


MEANS = ("ipo", "sigmoid_norm", "simpo", "alphapo", "orpo")  # the variants of docs/losses.md that are over token means


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_metrics_of_dpo(pairs, variant, average):
    """Rewards are beta times what the loss compares: means for simpo, orpo, ipo and sigmoid_norm, else sums. The
    accuracy is how often the chosen one's is larger; logps are sums, whatever the variant."""
    batch, logps, ref = pairs
    loss = create_loss("dpo", beta=BETA, variant=variant, average_log_prob=average, **OWN.get(variant, {}))
    free = "reference" not in loss.requires
    output = loss(batch, Models(Table(logps), None if free else Table(ref)))
    metrics = {name: (total / weight).item() for name, (total, weight) in output.metrics.items()}
    ours, counts = of_pairs(batch, logps.detach()), of_pairs(batch, torch.ones_like(ref))
    theirs = of_pairs(batch, torch.zeros_like(ref) if free else ref)
    over_means = average or variant in MEANS
    chosen, rejected = (
        [BETA * (a[i] - b[i]) / (n[i] if over_means else 1) for a, b, n in zip(ours, theirs, counts)] for i in (0, 1)
    )
    if variant == "alphapo":
        chosen, rejected = ([BETA * shaped(r / BETA) for r in side] for side in (chosen, rejected))
    mean = lambda values: sum(values) / N  # noqa: E731
    assert metrics == pytest.approx(
        {
            "rewards/chosen": mean(chosen),
            "rewards/rejected": mean(rejected),
            "rewards/accuracies": mean([float(w > l) for w, l in zip(chosen, rejected)]),  # noqa: E741
            "rewards/margins": mean(chosen) - mean(rejected),
            "logps/chosen": mean([w for w, _ in ours]),
            "logps/rejected": mean([l for _, l in ours]),  # noqa: E741
        }
    )


@pytest.mark.parametrize("variant", MEANS)
def test_the_accuracy_does_not_favor_short_answers(pairs, variant):
    """Each token of a chosen answer at -1, of a rejected one at -1.5: all pairs are right, however long the answers
    are. Of their sums it would be the shorter one more often."""
    batch, _, ref = pairs
    logps = torch.where(batch.target_docs % 2 == 0, -1.0, -1.5).double()
    loss = create_loss("dpo", variant=variant)
    total, weight = loss(batch, Models(Table(logps), Table(torch.zeros_like(ref)))).metrics["rewards/accuracies"]
    assert total == weight == N
    assert any(w < l for w, l in of_pairs(batch, logps))  # noqa: E741


def test_orpo_is_stable_at_both_ends():
    """Probabilities of an answer near 0 and near 1 give finite values and gradients."""
    batch = collated(examples("preference"), [[0]])
    for level in (-1e-12, -1e-3, -50.0):
        logps = torch.full((batch.n_targets,), level, requires_grad=True)
        output = create_loss("dpo", variant="orpo")(batch, Models(Table(logps)))
        output.loss_sum.backward()
        assert torch.isfinite(output.loss_sum) and torch.isfinite(logps.grad).all()


@pytest.mark.parametrize("gap", [-300.0, 300.0])
@pytest.mark.parametrize("variant", [*VARIANTS, "kto"])
def test_answers_that_are_far_off_are_finite(variant, gap):
    """The policy finds all of one answer 300 nats a token likelier, or less likely, than the reference and the other
    answer: loss, gradient and metrics are finite in float32, where exp(88) is not (trl#6637)."""
    kto = variant == "kto"
    batch = collated(examples("unpaired_preference" if kto else "preference"), [[i] for i in range(N)])
    first = batch.target_docs % 2 == 0
    logps = torch.where(first == (gap < 0), -301.0, -1.0).requires_grad_()
    loss = create_loss("kto") if kto else create_loss("dpo", variant=variant)
    ref = Table(torch.where(first == (gap < 0), -1.0, -301.0)) if "reference" in loss.requires else None
    if kto:
        loss.set_step_statistics(loss.step_statistics(batch, Models(Table(logps.detach()), ref)))
    output = loss(batch, Models(Table(logps), ref))
    output.loss_sum.backward()
    assert torch.isfinite(output.loss_sum) and torch.isfinite(logps.grad).all()
    assert all(torch.isfinite(total) for total, _ in output.metrics.values())


def test_kto_equals_its_formula():
    """z is the mean log-ratio of the mismatched answers of all of the step, at least 0, and has no gradient."""
    made = examples("unpaired_preference")
    batch = collated(made, [[i] for i in range(N)])
    generator = torch.Generator().manual_seed(3)
    logps, ref = (-torch.rand(batch.n_targets, generator=generator, dtype=torch.float64) for _ in range(2))
    for shift, sign in ((0.1, 1), (-0.5, 0)):  # z above 0, and held at 0
        policy = Table((logps + shift).requires_grad_())
        loss = create_loss("kto", beta=BETA, undesirable_weight=0.5)
        loss.set_step_statistics(loss.step_statistics(batch, Models(policy, Table(ref))))
        output = loss(batch, Models(policy, Table(ref)))
        ratios = of_pairs(batch, policy.logps.detach() - ref)
        z = max(0.0, sum(other for _, other in ratios) / N)
        assert (z > 0) == bool(sign)
        want = 0.0
        for example, (r, _) in zip(made, ratios):
            wanted = example[0].doc_features["desirable"]
            want += 1 - sig(BETA * (r - z)) if wanted else 0.5 * (1 - sig(BETA * (z - r)))
        assert output.loss_sum.item() == pytest.approx(want)
        output.loss_sum.backward()
        second = batch.target_docs % 2 == 1  # the mismatched answers
        assert not policy.logps.grad[second].any() and policy.logps.grad[~second].all()
        assert output.metrics["kl"][0].item() == pytest.approx(z * N)


class Scored:
    """A policy that gives documents these scores."""

    def __init__(self, scores: torch.Tensor):
        self.scores = scores

    def __call__(self, batch, **asked) -> PolicyOutput:
        return PolicyOutput(None, batch.target_docs, batch.n_docs, scores=self.scores[:, None])


@pytest.mark.parametrize("options", [{}, {"margin": 0.5}, {"loss_type": "hinge"}, {"center_rewards_coefficient": 0.01}])
def test_pairwise_equals_its_formula(options):
    """-logsig(s_w - s_l - margin) or relu(margin - (s_w - s_l)), and the square of the sum."""
    made = examples("preference")
    batch = collated(made, [[i] for i in range(N)])
    scores = torch.randn(batch.n_docs, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = create_loss("pairwise", **options)
    want = 0.0
    for example, (w, l) in zip(made, scores.view(-1, 2).tolist()):  # noqa: E741
        apart = w - l - options.get("margin", example[0].doc_features["margin"])
        want += max(0.0, -apart) if options.get("loss_type") == "hinge" else -logsig(apart)
        want += options.get("center_rewards_coefficient", 0.0) * (w + l) ** 2
    output = loss(batch, Models(Scored(scores.requires_grad_())))
    assert output.loss_sum.item() == pytest.approx(want, rel=1e-6) and output.num_items == N
    assert torch.autograd.gradcheck(lambda x: loss(batch, Models(Scored(x))).loss_sum, (scores,), atol=1e-4)
    accuracy = sum(w > l for w, l in scores.view(-1, 2).tolist()) / N  # noqa: E741
    assert (output.metrics["accuracy"][0] / N).item() == pytest.approx(accuracy)


# ----------------------------------------------------------------------------------------------- through the trainer


@pytest.fixture(scope="session")
def preferences(tmp_path_factory):
    """24 preferences whose answers are of very different lengths."""
    file = tmp_path_factory.mktemp("preferences") / "pairs.jsonl"
    rows = [{"prompt": f"say {i} " * (1 + i % 3), "chosen": "ab" * (1 + i % 7), "rejected": "b" * 3} for i in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def dpo(make_trainer, preferences):
    """``dpo("packing=true", ...)``: a trainer over the preferences."""

    def make(*overrides: str, **hooks):
        return make_trainer(f"datasets=[{preferences}]", "loss.name=dpo", *overrides, **hooks)

    return make


def first_loss(trainer) -> float:
    trainer.train()
    return metrics(trainer)[0]["loss"]


def with_dropout(trainer):
    for module in trainer.policy.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return trainer


KINDS = ["model", "adapter", "precomputed"]


@pytest.mark.parametrize("lora", ["lora.rank=0", "lora.rank=4"])
@pytest.mark.parametrize("packing", ["packing=false", "packing=true"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_loss_is_ln_2(dpo, kind, packing, lora):
    """Whatever the reference is made of, it is the policy at the start, with dropout in the model (trl#744)."""
    dropout = ["lora.dropout=0.1"] if lora.endswith("4") else []
    trainer = with_dropout(dpo(f"loss.reference={kind}", packing, lora, *dropout, "n_steps=1"))
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-6)


def test_all_references_and_layouts_train_alike(dpo, tmp_path):
    """Three steps give the same weights with each kind of reference, padded or packed with shared prompts."""
    found = []
    for kind in KINDS:
        for packing in ("false", "true"):
            trainer = dpo(f"loss.reference={kind}", f"packing={packing}", f"exp_name={kind}-{packing}")
            assert trainer.train_loader.shares_prompts == (packing == "true")
            trainer.train()
            found.append(weights(trainer))
    for other in found[1:]:
        for name, tensor in found[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=2e-3, atol=2e-5)


def test_a_loaded_adapter_is_its_own_reference(dpo):
    """The reference of a loaded adapter is the adapter as it was loaded, and it does not drift (trl#1193)."""
    before = dpo("lora.rank=4", "lr=0.3", "exp_name=before")
    before.train()
    trainer = dpo(f"model.adapter={before.run.final}", "lr=0.1", "n_steps=2")
    batch = trainer.train_loader.micro_batches(trainer.train_loader.order(0)[:4])[0]
    with torch.no_grad():
        start, base = trainer.policy(batch).logps, dpo("exp_name=base").policy(batch).logps
    assert not torch.allclose(start, base, atol=1e-2)
    torch.testing.assert_close(trainer.models.reference(batch).logps, start)
    trainer.train()
    assert metrics(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    torch.testing.assert_close(trainer.models.reference(batch).logps, start)
    with torch.no_grad():
        assert not torch.allclose(trainer.policy(batch).logps, start, atol=1e-3)


def test_precomputed_log_probabilities_are_kept(dpo, monkeypatch, tmp_path):
    """The second start reads them; they are those of the model, and another model has others."""
    settings = ("loss.reference=precomputed", f"cache_dir={tmp_path / 'cache'}")
    first = dpo(*settings, "validation_split=4")
    cache = first.train_loader.examples.caches[0]
    noted = cache.token_features["ref_logps"]
    for loader in (first.train_loader, first.eval_loader):
        for batch in loader.eval_batches():
            with torch.no_grad():
                torch.testing.assert_close(batch.target_feature("ref_logps"), first.policy(batch).logps)
    monkeypatch.setattr("minitrain.training.aux_models.save_file", lambda *args: pytest.fail("computed again"))
    again = dpo(*settings, "exp_name=again").train_loader.examples.caches[0]
    assert torch.equal(again.token_features["ref_logps"], noted)
    with pytest.raises(pytest.fail.Exception):
        dpo(*settings, "exp_name=bf16", "model.policy_dtype=bfloat16")


@pytest.mark.parametrize("damage", [lambda content: content[:100], lambda content: content[:-400] + bytes(400)])
def test_a_damaged_file_of_log_probabilities_is_made_anew(dpo, tmp_path, capsys, damage):
    """Cut off by a full disk, or with a page of zeros, which are log-probabilities, too."""
    settings = ("loss.reference=precomputed", f"cache_dir={tmp_path / 'cache'}")
    first = dpo(*settings).train_loader.examples.caches[0]
    (file,) = first.path.parent.glob("*-reference.safetensors")
    whole = load_file(file)["ref_logps"].clone()
    file.write_bytes(damage(file.read_bytes()))
    again = dpo(*settings, "exp_name=again").train_loader.examples.caches[0]
    assert torch.equal(again.token_features["ref_logps"], whole)
    assert reports(capsys.readouterr().out, "damaged-file", f"{file}: ")


def test_a_reference_that_differs_is_refused(dpo, monkeypatch):
    """A second model that is not the policy is noticed before the first step."""
    from minitrain.training import aux_models

    load = aux_models.build_frozen

    def other(*args):
        policy = load(*args)
        for parameter in policy.parameters():
            parameter.data += 0.1
        return policy

    monkeypatch.setattr(aux_models, "build_frozen", other)
    with raises(ConfigError, "mismatch", "loss.reference: "):
        dpo("loss.reference=model")


def test_a_reference_in_bfloat16(dpo):
    """policy_dtype=bfloat16: the reference's residual stream is float32 as the policy's, so they agree closely."""
    trainer = dpo("model.policy_dtype=bfloat16", "n_steps=1")
    assert trainer.models.reference.policy.model.dtype == torch.bfloat16
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=0.02)


def test_a_policy_with_weights_in_bfloat16(dpo):
    """Without autocast it is a rounding away from its reference model in float32."""
    assert first_loss(dpo("model.master_dtype=bfloat16", "n_steps=1")) == pytest.approx(math.log(2), abs=0.02)


def test_a_reference_in_bfloat16_beside_a_policy_in_float32(dpo):
    """Its weights in bfloat16 meet activations in bfloat16, and not the policy's float32."""
    trainer = dpo("loss.reference=model", "model.reference_dtype=bfloat16", "n_steps=1")
    assert trainer.models.reference.policy.model.dtype == torch.bfloat16
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=0.02)


def whole_and_resumed(dpo, last_step, *overrides):
    """A run, and the rest of one that ended after `last_step`; both end with the same weights."""
    whole = dpo(*overrides, "exp_name=whole")
    whole.train()

    def stop(trainer):
        trainer.should_stop = trainer.step == last_step

    part = dpo(*overrides, "exp_name=part", on_step_end=stop)
    part.train()
    (part.run.path / "run.json").unlink()
    rest = dpo(*overrides, "exp_name=part")
    rest.train()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(rest).values()))
    return whole, rest


def test_evaluation_and_resumption_with_a_reference(dpo):
    """An interrupted run goes on with the reference of its start, not with the weights of the checkpoint."""
    overrides = ("n_steps=4", "save_every_steps=2", "validation_split=4", "eval_every_steps=2", "lora.rank=4")
    whole, rest = whole_and_resumed(dpo, 2, *overrides)
    assert metrics(whole, "eval")[-1]["loss"] == metrics(rest, "eval")[-1]["loss"]


def test_kto_evaluates_the_same_in_any_batch_size(make_trainer, tmp_path):
    """z is that of the whole evaluation."""
    file = tmp_path / "kto.jsonl"
    rows = [{"prompt": f"say {i}", "completion": "ab" * (1 + i % 5), "label": i % 3 > 0} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for size in (1, 3, 8):
        settings = ("loss.name=kto", "validation_split=8", f"eval_batch_size={size}", f"exp_name=size-{size}")
        trainer = make_trainer(f"datasets=[{file}]", *settings)
        found.append(trainer.train())
        assert {"rewards/chosen", "rewards/rejected", "kl"} <= found[-1].keys()
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-5) == pytest.approx(found[2]["loss"], rel=1e-5)


def test_a_reward_model_is_loaded_by_transformers(make_trainer, preferences):
    """final/ is an AutoModelForSequenceClassification of one label whose scores are ours, alone or padded, also
    where the padding token stands in the text (transformers#35352)."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    trainer = make_trainer(f"datasets=[{preferences}]", "loss.name=pairwise", "n_steps=12", "validation_split=4")
    figures = trainer.train()
    assert figures["accuracy"] > 0.7 and metrics(trainer)[-1]["loss"] < metrics(trainer)[0]["loss"]
    model = AutoModelForSequenceClassification.from_pretrained(trainer.run.final).eval()
    tokenizer = AutoTokenizer.from_pretrained(trainer.run.final)
    assert model.config.num_labels == 1 and tokenizer.pad_token_id != tokenizer.eos_token_id
    documents = [dataclasses.replace(d, shared=0) for i in range(6) for d in trainer.train_loader.examples[i]]
    longest = max(len(d.ids) for d in documents)
    ids = torch.full((len(documents), longest), tokenizer.pad_token_id)
    for row, document in zip(ids, documents):
        row[: len(document.ids)] = document.ids
    mask = (torch.arange(longest) < torch.tensor([len(d.ids) for d in documents])[:, None]).long()
    ours = trainer.policy.eval()(collate([[d] for d in documents], tokenizer.pad_token_id)).scores
    theirs = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_prompts_are_not_computed_twice(dpo):
    """A packed batch of pairs holds each prompt once."""
    loader = dpo("packing=true", "total_batch_size=24").train_loader
    (batch,) = loader.micro_batches(loader.order(0))
    documents = [d for i in range(24) for d in loader.examples[i]]
    assert batch.n_tokens == sum(len(d.ids) for d in documents) - sum(d.shared for d in documents)
    assert sum(d.shared for d in documents) > 100


def test_options_that_would_be_ignored(dpo):
    """Options of another variant are refused by name."""
    for options, code, part in (
        (["loss.gamma=2"], "no-effect", "loss.gamma: "),
        (["loss.variant=orpo", "loss.reference=model"], "no-effect", "loss.reference: "),
        (["loss.variant=apo_zero", "loss.label_smoothing=0.1"], "no-effect", "loss.label_smoothing: "),
        (["loss.variant=ipo", "loss.ipo_sums=true", "loss.average_log_prob=true"], "no-effect", "loss.ipo_sums: "),
        (["loss.variant=ippo"], "not-a-choice", "Did you mean ipo"),
    ):
        with raises(ConfigError, code, part):
            dpo(*options)


def test_rows_of_another_kind_are_refused(dpo, rows_file):
    """Conversations are no preferences; the type of a data set is checked with the loss."""
    with raises(ConfigError, "mismatch", "datasets[0].type: ", "conversation", "preference"):
        dpo(f"datasets=[{{path: {rows_file}, type: alpaca}}]")


def test_prepared_examples_are_those_of_the_registry():
    """The made-up pairs of the property tests share their prompts."""
    made = prepared(create_loss("dpo"))
    assert all(example[1].shared == int(example[0].mask.argmax()) for example in made)
