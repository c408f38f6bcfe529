"""Options of dpo and kto against closed forms in float64 and, where TRL has them, against TRL."""

import collections
import json
import math
from types import SimpleNamespace

import pytest
import torch

from minitrain import ConfigError, create_loss
from minitrain.batch import PolicyOutput
from minitrain.losses import Models
from tests.conftest import metrics
from tests.examples import N, collated, examples, models_for, prepared
from tests.losses.test_preference import BETA, logsig, of_pairs, sig, whole_and_resumed
from tests.messages import raises

pytestmark = pytest.mark.numeric
ALL = [[i] for i in range(N)]


class Table:
    """A policy that gives these log-probabilities and logs of sums of squares, whatever the batch says."""

    def __init__(self, logps: torch.Tensor, log_sum_squares: torch.Tensor | None = None):
        self.logps, self.log_sum_squares = logps, log_sum_squares

    def __call__(self, batch, **asked) -> PolicyOutput:
        return PolicyOutput(self.logps, batch.target_docs, batch.n_docs, log_sum_squares=self.log_sum_squares)


@pytest.fixture
def batch():
    return collated(examples("preference"), ALL)


@pytest.fixture
def tables(batch):
    """Log-probabilities of policy and reference, and logs of sums of squares."""
    generator = torch.Generator().manual_seed(3)
    logps, ref, squares = (-torch.rand(batch.n_targets, generator=generator, dtype=torch.float64) for _ in range(3))
    return logps.requires_grad_(), ref, squares


def value(batch, tables, **options) -> torch.Tensor:
    """The loss of dpo, checked against its numerical gradient."""
    loss = create_loss("dpo", **{"beta": BETA} | options)
    logps, ref, squares = tables

    def of(x):
        reference = Table(ref) if "reference" in loss.requires else None
        return loss(batch, Models(Table(x, squares), reference)).loss_sum

    if not options.get("wpo"):  # whose weights have no gradient
        assert torch.autograd.gradcheck(of, (logps,), eps=1e-6, atol=1e-5)
    return of(logps)


def test_a_weighted_sum_of_variants(batch, tables):
    """MPO (arXiv 2411.10442) is 0.8 of DPO, 0.2 of BCO and the negative log-likelihood of a token."""
    single = {name: value(batch, tables, variant=name) for name in ("sigmoid", "bco_pair", "ipo")}
    nll = value(batch, tables, sft_weight=1.0) - single["sigmoid"]
    found = value(batch, tables, variant_weights={"sigmoid": 0.8, "bco_pair": 0.2, "ipo": 0.1}, sft_weight=1.0)
    wanted = 0.8 * single["sigmoid"] + 0.2 * single["bco_pair"] + 0.1 * single["ipo"] + nll
    assert found.item() == pytest.approx(wanted.item(), rel=1e-9)


def test_the_shift_of_bco(batch, tables):
    """Half the mean reward of the chosen and half of the rejected answers is subtracted, without gradient."""
    logps, ref, _ = tables
    ratios = of_pairs(batch, logps.detach() - ref)
    delta = BETA * sum(w + l for w, l in ratios) / (2 * N)  # noqa: E741
    wanted = sum(-logsig(BETA * w - delta) - logsig(delta - BETA * l) for w, l in ratios)  # noqa: E741
    loss = create_loss("dpo", variant="bco_pair", bco_shift=True, beta=BETA)
    output = loss(batch, Models(Table(logps), Table(ref)))
    output.loss_sum.backward()
    assert output.loss_sum.item() == pytest.approx(wanted, rel=1e-9)
    slopes = [-BETA * sig(delta - BETA * w) for w, _ in ratios]
    assert logps.grad[batch.target_docs == 2][0].item() == pytest.approx(slopes[1], rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_ld_dpo(batch, tables, alpha):
    """Tokens after the length of the shorter answer of the pair weigh alpha (arXiv 2409.06411)."""
    logps, ref, _ = tables
    found = value(batch, tables, ld_alpha=alpha)
    lengths = [int(n) for n in torch.bincount(batch.target_docs)]
    answers = (logps.detach() - ref).split(lengths)
    wanted = 0.0
    for w, l in zip(answers[::2], answers[1::2]):  # noqa: E741
        n = min(len(w), len(l))
        sums = [float(x[:n].sum() + alpha * x[n:].sum()) for x in (w, l)]
        wanted -= logsig(BETA * (sums[0] - sums[1]))
    assert found.item() == pytest.approx(wanted, rel=1e-6)
    assert len({len(w) > len(l) for w, l in zip(answers[::2], answers[1::2])}) == 2  # noqa: E741


def test_wpo(batch, tables):
    """A pair's loss is multiplied by exp of the mean log-probability of both answers' tokens, each minus the log of
    the sum of squares of its distribution (arXiv 2406.11827, eq. 2); at most 1."""
    logps, ref, squares = tables
    ratios, counts = of_pairs(batch, logps.detach() - ref), of_pairs(batch, torch.ones_like(ref))
    aligned = of_pairs(batch, logps.detach() - squares)
    factors = [min(1.0, math.exp(a / n + b / m)) for (a, b), (n, m) in zip(aligned, counts)]
    assert len({factor == 1 for factor in factors}) == 2
    wanted = sum(-f * logsig(BETA * (w - l)) for f, (w, l) in zip(factors, ratios))  # noqa: E741
    assert value(batch, tables, wpo=True).item() == pytest.approx(wanted, rel=1e-6)


def test_the_sum_of_squares_is_that_of_the_model():
    """It comes from the chunked head, equals that of the full logits, and leaves the gradient as it is."""
    loss, gradients = create_loss("dpo"), []
    made = collated(prepared(loss), ALL)
    for measured in ({}, {"log_sum_squares": True}):
        policy = models_for(loss).policy
        output = policy(made, **measured)
        output.logps.sum().backward()
        gradients.append([p.grad for p in policy.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert output.log_sum_squares.grad_fn is None
    hidden, head = policy.target_hidden_states(made)
    logps = (hidden @ head.weight.T).log_softmax(1)
    torch.testing.assert_close(output.log_sum_squares, (2 * logps).logsumexp(1), rtol=1e-4, atol=1e-4)


DERIVATIVES = {  # of f at u = policy / reference (arXiv 2309.16240, table 1), up to a constant
    "forward_kl": lambda u: -1 / u,
    "js": lambda u: math.log(2 * u / (1 + u)),
    "alpha": lambda u: (1 - u**-0.3) / 0.3,
}


@pytest.mark.parametrize("name", DERIVATIVES)
@pytest.mark.parametrize("variant", ["sigmoid", "hinge"])
def test_f_divergences(batch, tables, name, variant):
    logps, ref, _ = tables
    options = {"f_alpha": 0.3} if name == "alpha" else {}
    found = value(batch, tables, variant=variant, f_divergence=name, **options)
    slope = DERIVATIVES[name]
    gaps = [BETA * (slope(math.exp(w)) - slope(math.exp(l))) for w, l in of_pairs(batch, logps.detach() - ref)]  # noqa: E741
    assert found.item() == pytest.approx(sum(-logsig(d) if variant == "sigmoid" else max(0, 1 - d) for d in gaps))


def test_alpha_divergences_are_between_reverse_and_forward_kl(batch, tables):
    """Towards 0 the loss is that of DPO, towards 1 that of forward KL."""
    near_0, near_1 = (value(batch, tables, f_divergence="alpha", f_alpha=a).item() for a in (1e-6, 1 - 1e-6))
    assert near_0 == pytest.approx(value(batch, tables).item(), rel=1e-4)
    assert near_1 == pytest.approx(value(batch, tables, f_divergence="forward_kl").item(), rel=1e-4)


@pytest.mark.parametrize("gap", [-300.0, 300.0])
@pytest.mark.parametrize("options", [{"f_divergence": name} for name in DERIVATIVES] + [{"wpo": True}], ids=str)
def test_answers_that_are_far_off_are_finite(batch, options, gap):
    first = batch.target_docs % 2 == 0
    logps = torch.where(first == (gap < 0), -301.0, -1.0).requires_grad_()
    reference = Table(torch.where(first == (gap < 0), -1.0, -301.0))
    output = create_loss("dpo", **options)(batch, Models(Table(logps, logps.detach() * 2), reference))
    output.loss_sum.backward()
    assert torch.isfinite(output.loss_sum) and torch.isfinite(logps.grad).all()
    assert all(torch.isfinite(total) for total, _ in output.metrics.values())


def test_alphapo_is_simpo_near_zero(batch, tables):
    found = value(batch, tables, variant="alphapo", alphapo_alpha=1e-6, gamma=0.7).item()
    assert found == pytest.approx(value(batch, tables, variant="simpo", gamma=0.7).item(), rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- TRL

OF_TRL = {
    **{
        name: ({"variant": name}, {"loss_types": [name]})
        for name in ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair")
    },
    **{
        name: ({"variant": name}, {"loss_types": [name]})
        for name in ("sppo_hard", "apo_zero", "apo_down", "sigmoid_norm")
    },
    "discopop": ({"variant": "discopop"}, {"loss_types": ["discopop"]}),
    "aot": ({"variant": "aot", "label_smoothing": 0.1}, {"loss_types": ["aot"], "label_smoothing": 0.1}),
    "aot_unpaired": ({"variant": "aot_unpaired"}, {"loss_types": ["aot_unpaired"]}),
    "mpo": (
        {"variant_weights": {"sigmoid": 0.8, "bco_pair": 0.2}},
        {"loss_types": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]},
    ),
    "ld": ({"ld_alpha": 0.3}, {"ld_alpha": 0.3}),
    "forward_kl": ({"f_divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    "js": ({"f_divergence": "js"}, {"f_divergence_type": "js_divergence"}),
    "alpha": (
        {"f_divergence": "alpha", "f_alpha": 0.3},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    ),
    "wpo": ({"wpo": True}, {"use_weighting": True}),
}


@pytest.mark.parametrize("name", OF_TRL)
def test_the_loss_is_that_of_trl(batch, tables, name):
    """TRL's own function, on the same log-probabilities in its padded layout: the same mean loss and gradient."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    if not hasattr(trainer, "_compute_loss") or "discopop" not in trainer._compute_loss.__code__.co_consts:
        pytest.skip("another version of TRL")
    options, of_trl = OF_TRL[name]
    logps, ref, _ = (t.detach().float() for t in tables)
    squares = torch.zeros_like(ref)  # so that no weight is above 1, which TRL 1.16 allows
    lengths = torch.bincount(batch.target_docs).tolist()
    order = [*range(0, 2 * N, 2), *range(1, 2 * N, 2)]  # all chosen answers, then all rejected ones

    def padded(values):
        parts = values.split(lengths)
        return torch.nn.utils.rnn.pad_sequence([parts[i] for i in order], batch_first=True)  # [2 N, T]

    mask = torch.nn.functional.pad(padded(torch.ones_like(ref)), (1, 0)).long()  # a prompt of one token
    ours, theirs = (logps.clone().requires_grad_() for _ in range(2))
    refs = padded(ref).sum(1).chunk(2)
    if name == "ld":
        shorter = torch.tensor(lengths)[order].view(2, N).amin(0).repeat(2)[:, None]
        of_step = torch.arange(max(lengths))[None] < shorter
        refs = (padded(ref) * torch.where(of_step, 1.0, 0.3)).sum(1).chunk(2)
    zeros = torch.zeros_like(mask[:, 1:], dtype=torch.float)
    outputs = SimpleNamespace(
        log_probs=padded(theirs), log_sum_sq_probs=padded(squares), entropy=zeros, mean_logits=zeros, is_top1=zeros > 0
    )
    same = lambda x: x  # noqa: E731
    state = dict(
        loss_types=["sigmoid"], loss_weights=[1.0], ld_alpha=None, f_divergence_type="reverse_kl", beta=BETA,
        f_alpha_divergence_coef=0.5, label_smoothing=0.0, use_weighting=False, aux_loss_enabled=False,
        precompute_ref_logps=True, args=SimpleNamespace(discopop_tau=0.05), _total_train_tokens=0, _tp_size=1,
        model=SimpleNamespace(training=True), _metrics={"train": collections.defaultdict(list)},
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
    )  # fmt: skip
    inputs = dict(input_ids=torch.zeros_like(mask), attention_mask=torch.ones_like(mask), completion_mask=mask)
    inputs |= dict(ref_chosen_logps=refs[0], ref_rejected_logps=refs[1])
    wanted = trainer._compute_loss(SimpleNamespace(**state | of_trl), lambda **_: outputs, inputs, False)
    loss = create_loss("dpo", beta=BETA, **options)
    found = loss(batch, Models(Table(ours, squares), Table(ref))).loss_sum / N
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    found.backward()
    wanted.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------- kto


@pytest.mark.parametrize("change", [0.1, -0.3])
@pytest.mark.parametrize("variant", ["apo_zero_unpaired", "bco"])
def test_variants_of_kto(variant, change):
    """apo_zero_unpaired is kto with z = 0. BCO is the cross entropy of a classifier whose logit is beta r - delta,
    delta half the mean reward of desirable answers and half that of undesirable ones, which can be negative."""
    loss = create_loss("kto", variant=variant, beta=BETA, undesirable_weight=0.5)
    made = prepared(loss)
    batch = collated(made, ALL)
    assert batch.n_docs == loss.num_items(batch) == N  # no responses to other prompts
    generator = torch.Generator().manual_seed(3)
    logps, ref = (-torch.rand(batch.n_targets, generator=generator, dtype=torch.float64) for _ in range(2))
    policy, reference = Table((logps + change).requires_grad_()), Table(ref)
    assert loss.has_step_statistics == (variant == "bco")
    if loss.has_step_statistics:
        loss.set_step_statistics(loss.step_statistics(batch, Models(policy, reference)))
    output = loss(batch, Models(policy, reference))
    ratios = torch.zeros(N).double().index_add(0, batch.target_docs, policy.logps.detach() - ref).tolist()
    labels = [example[0].doc_features["desirable"] for example in made]
    means = [sum(r for r, x in zip(ratios, labels) if x == y) / labels.count(y) for y in (1.0, 0.0)]
    assert sum(means) * change > 0
    z = sum(means) / 2 if variant == "bco" else 0.0
    of_good = (lambda x: -logsig(x)) if variant == "bco" else (lambda x: 1 - sig(x))
    wanted = sum(of_good(BETA * (r - z)) if x else 0.5 * of_good(BETA * (z - r)) for r, x in zip(ratios, labels))
    assert output.loss_sum.item() == pytest.approx(wanted) and "kl" not in output.metrics
    output.loss_sum.backward()
    assert policy.logps.grad.all()


# --------------------------------------------------------------------------------------------- a reference that moves


@pytest.fixture
def dpo(make_trainer, tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"say {i}", "chosen": "ab" * (1 + i % 7), "rejected": "b" * 3} for i in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(*overrides: str, **hooks):
        return make_trainer(f"datasets=[{file}]", "loss.name=dpo", "lr=0.02", *overrides, **hooks)

    return make


SYNC = ("loss.reference_sync_steps=2", "loss.reference_mixup=0.6", "n_steps=5")


@pytest.mark.parametrize("lora", ["lora.rank=0", "lora.rank=4"])
def test_the_reference_moves_towards_the_policy(dpo, lora):
    """TR-DPO: after every second update, 0.4 of the reference and 0.6 of the policy; the last loss is against that."""
    seen = []

    def remember(trainer):
        reference = [tensor.clone() for tensor in trainer.models.reference.tensors()]
        seen.append((reference, [p.detach().clone() for p in trainer.parameters]))

    trainer = dpo(*SYNC, lora, on_train_begin=remember, on_step_end=remember)
    trainer.train()
    start = seen[0][0]
    for step, (reference, policy) in enumerate(seen):
        if step and step % 2 == 0:
            start = [0.4 * a + 0.6 * b for a, b in zip(start, policy)]
        torch.testing.assert_close(reference, start)
    assert any((a != b).any() for a, b in zip(start, seen[0][0]))


def test_a_hard_update_starts_again_at_ln_2(dpo):
    trainer = dpo("loss.reference_sync_steps=2", "loss.reference_mixup=1", "n_steps=5")
    trainer.train()
    losses = [row["loss"] for row in metrics(trainer)]
    assert [abs(loss - math.log(2)) < 1e-5 for loss in losses] == [True, False, True, False, True]


@pytest.mark.parametrize("save_async", ["true", "false"])
def test_a_moved_reference_is_in_the_checkpoint(dpo, save_async):
    """An interrupted run goes on with the moved reference, to the same weights."""
    overrides = (*SYNC, "save_every_steps=1", f"save_async={save_async}")
    whole, rest = whole_and_resumed(dpo, 3, *overrides)
    assert all(map(torch.equal, whole.models.reference.tensors(), rest.models.reference.tensors()))


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "code", "key"),
    [
        ({"variant_weights": {"sigmod": 1.0}}, "conflict", "variant_weights"),
        ({"variant_weights": {"sigmoid": -1.0}}, "conflict", "variant_weights"),
        ({"variant_weights": {"ipo": 1.0}, "variant": "hinge"}, "no-effect", "variant"),
        ({"alphapo_alpha": 0.0, "variant": "alphapo"}, "conflict", "alphapo_alpha"),
        ({"alphapo_alpha": 0.1}, "no-effect", "alphapo_alpha"),
        ({"discopop_tau": 0.1}, "no-effect", "discopop_tau"),
        ({"bco_shift": True}, "no-effect", "bco_shift"),
        ({"f_divergence": "js", "variant": "bco_pair"}, "conflict", "f_divergence"),
        ({"f_divergence": "js", "average_log_prob": True}, "conflict", "f_divergence"),
        ({"f_divergence": "js", "variant": "orpo"}, "no-effect", "f_divergence"),
        ({"f_alpha": 0.2, "f_divergence": "js"}, "no-effect", "f_alpha"),
        ({"ld_alpha": 0.2, "variant": "simpo"}, "conflict", "ld_alpha"),
        ({"wpo": True, "variant": "aot"}, "conflict", "wpo"),
        ({"reference_mixup": 0.5}, "no-effect", "reference_mixup"),
        ({"reference_sync_steps": 2, "reference": "model"}, "conflict", "reference_sync_steps"),
        ({"reference_sync_steps": 2, "reference": "precomputed"}, "conflict", "reference_sync_steps"),
        ({"reference_sync_steps": 2, "variant": "simpo"}, "no-effect", "reference_sync_steps"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options, code, key):
    with raises(ConfigError, code, f"loss.{key}: "):
        create_loss("dpo", **options)


@pytest.mark.parametrize("variant", ["apo_zero_unpaired", "bco"])
def test_variants_of_kto_read_each_prompt_once(make_trainer, tmp_path, variant):
    """They train on rows of one prompt, which kto refuses, and evaluate the same in any batch size."""
    file, found = tmp_path / "kto.jsonl", []
    rows = [{"prompt": "say", "completion": "ab" * (1 + i % 5), "label": i % 3 > 0} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for size in (1, 8):
        settings = ("loss.name=kto", f"loss.variant={variant}", "validation_split=8", f"eval_batch_size={size}")
        trainer = make_trainer(f"datasets=[{file}]", *settings, f"exp_name=size-{size}")
        assert len(trainer.train_loader.examples[0]) == 1
        found.append(trainer.train())
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)


def test_a_moving_reference_of_kto():
    with raises(ConfigError, "conflict", "loss.reference_sync_steps: "):
        create_loss("kto", reference_sync_steps=2, reference="precomputed")
    with raises(ConfigError, "no-effect", "loss.reference_mixup: "):
        create_loss("kto", reference_mixup=0.2)
