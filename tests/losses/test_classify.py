"""The loss classify against PyTorch and closed forms; its labels over files; its figures on cases worked by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minitrain import ConfigError, create_loss, load_config
from minitrain.batch import PolicyOutput
from minitrain.errors import MinitrainError
from minitrain.losses import Models, add_features, classify
from tests.examples import collated, examples
from tests.messages import raises


class Outputs:
    """A policy whose scores are a given [D, L] table."""

    def __init__(self, scores: torch.Tensor):
        self.scores = scores.requires_grad_()

    def __call__(self, batch) -> PolicyOutput:
        return PolicyOutput(None, batch.target_docs, batch.n_docs, scores=self.scores)


def file(labels: list[str], source: str = "train.jsonl", order: list[str] | None = None) -> SimpleNamespace:
    """A data file with one example of each label named."""
    names = order or list(dict.fromkeys(labels))
    counts = np.array([names.index(label) for label in labels], np.float64)
    return SimpleNamespace(source=source, doc_features={"label": counts}, token_features={}, labels=names)


def prepared(train, evaluation=(), **options):
    loss = create_loss("classify", **options)
    add_features(loss, train, evaluation)
    return loss


@pytest.fixture
def batch():
    made = examples("classification")  # the labels are 0 1 2 0 1 2 0 1
    return collated(made, [[i] for i in range(len(made))])


LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.5]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(batch, smoothing, weights):
    """Sum, weight and gradient give the mean of F.cross_entropy with class weights and label smoothing."""
    named = dict(zip("012", weights, strict=True)) if weights else {}
    loss = prepared([file(["0", "1", "2"])], label_smoothing=smoothing, class_weights=named)
    policy = Outputs(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    output = loss(batch, Models(policy))
    (output.loss_sum / loss.num_items(batch)).backward()
    exact = policy.scores.detach().double().requires_grad_()
    given = torch.tensor(weights).double() if weights else None
    want = F.cross_entropy(exact, LABELS, given, label_smoothing=smoothing)
    if weights and smoothing:  # PyTorch takes the smoothed part's mean over the weights of the labels, too
        assert want.item() == pytest.approx((output.loss_sum / output.num_items).item(), rel=1e-5)
    want.backward()
    assert (output.loss_sum / output.num_items).item() == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(policy.scores.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)
    hits, count = output.metrics["accuracy"]
    assert hits == (exact.argmax(1) == LABELS).sum() and count == 8


@pytest.mark.parametrize("weights", [{}, {"b": 3.0}])
def test_several_labels(batch, weights):
    """Loss and gradient are those of PyTorch's mean over examples and labels. Both files have their own lists."""
    train, held = file(['["a", "b"]', "[]", '["c"]']), file(['["c"]', "b"], "held.jsonl")
    loss = prepared([train], [held], multi_label=True, class_weights=weights)
    assert loss.head_labels == ["a", "b", "c"]
    assert held.doc_features["label"].tolist() == [3, 4] and held.labels == [*train.labels[:3], '["c"]', "b"]
    assert loss.label_sets.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 1], [0, 1, 0]]
    policy = Outputs(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    output = loss(batch, Models(policy))
    (output.loss_sum / loss.num_items(batch)).backward()
    exact, actual = policy.scores.detach().double().requires_grad_(), loss.label_sets[LABELS].double()
    given = torch.tensor([1.0, weights.get("b", 1.0), 1.0]).double()
    want = F.binary_cross_entropy_with_logits(exact, actual, pos_weight=given)
    want.backward()
    assert (output.loss_sum / output.num_items).item() == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(policy.scores.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)
    found = loss.finalize_metrics({k: (total / n).item() for k, (total, n) in output.metrics.items()})
    pairs = [(bool(p), bool(y)) for p, y in zip((exact > 0).flatten(), actual.flatten())]
    f1s = [
        2 * each.count((True, True)) / (sum(map(sum, each)) or 1)
        for each in (pairs, pairs[::3], pairs[1::3], pairs[2::3])
    ]
    assert found["f1_micro"] == pytest.approx(f1s[0]) and found["f1_macro"] == pytest.approx(sum(f1s[1:]) / 3)
    right = [pairs[i : i + 3] for i in range(0, 24, 3)]
    assert found["accuracy"] == pytest.approx(sum(all(p == y for p, y in row) for row in right) / 8)
    assert found.keys() == {"accuracy", "f1_micro", "f1_macro"}


def test_squared_error(batch):
    """Regression: (output - number)^2, by example."""
    loss = prepared([file(["0", "1", "2"])], regression=True)
    assert loss.head_labels == ["score"]
    policy = Outputs(torch.randn(8, 1, generator=torch.Generator().manual_seed(0)))
    output = loss(batch, Models(policy))
    output.loss_sum.backward()
    want = policy.scores.detach()[:, 0] - LABELS
    assert (
        output.loss_sum.item() == pytest.approx((want.double() ** 2).sum().item(), rel=1e-5) and output.num_items == 8
    )
    torch.testing.assert_close(policy.scores.grad[:, 0], 2 * want)


# ------------------------------------------------------------------------------------------------ labels of files


def test_labels_mean_the_same_in_all_files():
    """Each file counts labels as they come in it; afterwards all count the same. A file in both lists is one."""
    one, two, held = file(["b", "a", "b"]), file(["c", "b"], "two.jsonl"), file(["c", "c", "a"], "held.jsonl")
    loss = create_loss("classify")
    assert loss.head_labels == []
    add_features(loss, [one, two], [held, one])
    assert loss.head_labels == ["a", "b", "c"]
    assert [f.doc_features["label"].tolist() for f in (one, two, held)] == [[1, 0, 1], [2, 1], [2, 2, 0]]
    numbers = file(["2.5", "1", "2.5"])
    prepared([numbers], [numbers], regression=True)
    assert numbers.doc_features["label"].tolist() == [2.5, 1, 2.5]


@pytest.mark.parametrize(
    "labels, ordered",
    [
        (["10", "9", "-1"], ["-1", "9", "10"]),
        (["10", "9", "x"], ["10", "9", "x"]),
        (["nan", "inf"], ["inf", "nan"]),
        (["0.5", "1e-3"], ["1e-3", "0.5"]),
    ],
)
def test_the_order_of_labels(labels, ordered):
    """By number when all are finite numbers, else by the alphabet."""
    assert prepared([file(labels)]).head_labels == ordered


def test_labels_in_an_order_of_ones_own():
    """The option decides the order, and may name labels that no example has; YAML's numbers are texts."""
    data = file(["1", "0", "1"])
    assert prepared([data], labels=[2, 1, 0]).head_labels == ["2", "1", "0"]
    assert data.doc_features["label"].tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    "train, held, options, code, parts",
    [
        (["a", "b"], ["a", "c"], {}, "mismatch", ("held.jsonl: ", "'c'", "a, b")),
        (["a", "b"], [], {"labels": ["a", "x"]}, "mismatch", ("train.jsonl: ", "'b'", "a, x")),
        (["1.2", "3.4"], ["5"], {}, "mismatch", ("held.jsonl: ", "loss.regression=true")),
        (["a", "a"], [], {}, "unsuitable-data", ("train.jsonl: ", "'a'")),
        (["1", "1.0"], [], {}, "unsuitable-data", ("train.jsonl: ", "'1' and '1.0'")),
        (["1", "x"], [], {"regression": True}, "invalid-row", ("train.jsonl: ", "'x'")),
        (["1", "2"], ["nan"], {"regression": True}, "invalid-row", ("held.jsonl: ", "'nan'")),
        (["a", "b"], [], {"labels": ["a", "b", "a"]}, "conflict", ("loss.labels: ",)),
        (["a", "b"], [], {"class_weights": {"z": 1.0}}, "conflict", ("loss.class_weights: ", "'z'", "a, b")),
        (["a", "b"], [], {"class_weights": {"a": 0.0}}, "conflict", ("loss.class_weights: ",)),
        (["a", "b"], [], {"positive_label": "z"}, "conflict", ("loss.positive_label: ", "'z'")),
        (["a", "b", "c"], [], {"positive_label": "a"}, "conflict", ("loss.positive_label: ", "3")),
        (['["a"]', "b"], [], {}, "unsuitable-data", ("train.jsonl: ", '["a"]')),
        (['["a"]', "[]"], [], {"multi_label": True}, "unsuitable-data", ("train.jsonl: ", "'a'")),
        (['["a"]', "b"], ['["b", "z"]'], {"multi_label": True}, "mismatch", ("held.jsonl: ", "'z'")),
        (["1", "2"], [], {"multi_label": True, "regression": True}, "conflict", ("loss.multi_label: ",)),
        (["1", "2"], [], {"multi_label": True, "label_smoothing": 0.1}, "no-effect", ("loss.label_smoothing: ",)),
    ],
)
def test_bad_labels(train, held, options, code, parts):
    """File and label, or the option, are named."""
    with raises(MinitrainError, code, *parts):
        prepared([file(train)], [file(held, "held.jsonl")] if held else [], **options)


def test_options_that_would_be_ignored(tmp_path):
    """Those of classes for regression, and those of chats."""
    (tmp_path / "a.jsonl").write_text("")
    config = {"datasets": [str(tmp_path / "a.jsonl")], "model": {"name_or_path": "tiny"}}
    wrong = {
        "loss.regression=true": "loss.label_smoothing",
        "train_on=last_turn": "train_on",
        "chat_template=none": "chat_template",
    }
    for override, key in wrong.items():
        with raises(ConfigError, "no-effect", f": {key}: "):
            load_config(config, ["loss.name=classify", "loss.label_smoothing=0.1", override])


# ------------------------------------------------------------------------------------------------------- figures


def judged(labels, predictions, names, **options) -> dict[str, float]:
    loss = prepared([file(names)], **options)
    return loss.compute_eval_metrics(
        {"label": [float(names.index(x)) for x in labels], "prediction": [float(names.index(x)) for x in predictions]}
    )


def test_figures_of_two_labels():
    """6 true positives, 2 false ones, 3 missed, 1 true negative: the last label, or the one that is named."""
    labels, predictions = list("yyyyyynnyyyn"), list("yyyyyyyynnnn")
    found = judged(labels, predictions, ["n", "y"])
    assert found["precision"] == pytest.approx(6 / 8) and found["recall"] == pytest.approx(6 / 9)
    assert found["f1"] == pytest.approx(12 / 17)
    assert found["matthews"] == pytest.approx((6 * 1 - 2 * 3) / math.sqrt(8 * 9 * 3 * 4))
    other = judged(labels, predictions, ["n", "y"], positive_label="n")
    assert (other["precision"], other["recall"]) == pytest.approx((1 / 4, 1 / 3))
    assert other["f1"] == pytest.approx(2 / 7) and other["matthews"] == found["matthews"]


def test_figures_of_more_labels():
    """Plain means over the labels that occur, `d` does not; Matthews is R_K, which is its formula for two labels."""
    found = judged(list("aaabbc"), list("aabbbb"), list("abcd"))
    each = {"a": (1.0, 2 / 3), "b": (2 / 4, 1.0), "c": (0.0, 0.0)}  # precision, recall
    assert found["precision"] == pytest.approx(sum(p for p, _ in each.values()) / 3)
    assert found["recall"] == pytest.approx(sum(r for _, r in each.values()) / 3)
    assert found["f1"] == pytest.approx(sum(2 * p * r / (p + r) if p + r else 0 for p, r in each.values()) / 3)
    # c = 4 right of s = 6; taken 2, 4, 0; there 3, 2, 1
    assert found["matthews"] == pytest.approx((4 * 6 - (6 + 8)) / math.sqrt((36 - 20) * (36 - 14)))


def test_matthews_is_the_correlation_of_zeros_and_ones():
    """On random labels and predictions it is numpy's correlation coefficient."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, 50), rng.integers(0, 2, 50)
    assert classify.matthews(classify.confusion(a, b, 2)) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)


def test_figures_where_nothing_is_to_divide_by():
    """All predictions one label: 0, as is the convention, and no NaN; no example at all: no figures."""
    found = judged(list("nny"), list("nnn"), ["n", "y"])
    assert found == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "matthews": 0.0}
    assert prepared([file(["n", "y"])]).compute_eval_metrics({}) == {}


def test_correlations():
    """Pearson is numpy's; Spearman is that of ranks, by hand with ties: [1, 2.5, 2.5, 4] and [2, 1, 3.5, 3.5]."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=40), rng.normal(size=40)
    assert classify.pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)
    distinct = (a.argsort().argsort(), b.argsort().argsort())
    assert classify.spearman(a, b) == pytest.approx(
        1 - 6 * ((distinct[0] - distinct[1]) ** 2).sum() / (40 * (40**2 - 1))
    )
    tied = classify.spearman(np.array([0.1, 5, 5, 7]), np.array([2.0, 1, 9, 9]))
    assert tied == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [2, 1, 3.5, 3.5])[0, 1], abs=1e-12)
    assert math.isnan(classify.pearson(np.ones(3), a[:3]))
    loss = prepared([file(["1", "2"])], regression=True)
    assert loss.compute_eval_metrics({"label": [1.0, 2, 3], "prediction": [1.0, 4, 9]})["spearman"] == pytest.approx(1)
