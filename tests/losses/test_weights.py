"""Weights of turns multiply the losses of their tokens, and the sum is divided by that of the weights of the step."""

import copy
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minitrain import DataError, Loss, LossOutput, RunError, create_loss
from minitrain.batch import TARGET_WEIGHTS
from minitrain.losses.sft import SFTOptions, TokenLoss
from tests.chats import assert_same, conversations, first_step, written
from tests.examples import N, collated, models_for, prepared, step
from tests.messages import raises

pytestmark = pytest.mark.numeric


def nll(logits, ids, options, teacher):
    return -logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def smoothed(logits, ids, options, teacher):
    return F.cross_entropy(logits, ids, label_smoothing=options["label_smoothing"], reduction="none")


def focal(logits, ids, options, teacher):
    losses = nll(logits, ids, options, teacher)
    return (1 - (-losses).exp()) ** options["focal_gamma"] * losses


def dft(logits, ids, options, teacher):
    losses = nll(logits, ids, options, teacher)
    return (-losses).exp().detach() * losses


def kd(logits, ids, options, teacher):
    """0.7 T^2 KL(T||S) at T = 4, and 0.3 times the cross entropy."""
    divergence = F.kl_div((logits / 4).log_softmax(-1), (teacher / 4).softmax(-1), reduction="none").sum(-1)
    return 0.7 * 16 * divergence + 0.3 * nll(logits, ids, options, teacher)


FORMULAS = [
    ("sft", {}, nll),
    ("sft", {"label_smoothing": 0.1}, smoothed),
    ("sft", {"focal_gamma": 2.0}, focal),
    ("dft", {}, dft),
    ("kd", {}, kd),
]


def by_hand(name: str, options: dict, formula, made) -> tuple[float, list[torch.Tensor], float]:
    """(loss, gradients, weighted mean of p) in float64: sum of w * loss over all tokens / sum of w."""
    models = models_for(create_loss(name, **options))
    model = copy.deepcopy(models.policy.model).double()
    teacher = copy.deepcopy(models.teacher.model).double() if models.teacher else None
    total = probability = n = 0.0
    for (document,) in made:
        ids, learned = document.ids[None].long(), document.mask[1:].bool()
        w = document.token_features[TARGET_WEIGHTS][1:][learned].double()
        logits = model(input_ids=ids).logits[0, :-1][learned]
        expected = teacher(input_ids=ids).logits[0, :-1][learned] if teacher else None
        total = total + (w * formula(logits, ids[0, 1:][learned], options, expected)).sum()
        probability += (w * logits.log_softmax(-1).gather(-1, ids[0, 1:][learned][:, None])[:, 0].exp()).sum().item()
        n += w.sum().item()
    (total / n).backward()
    return (total / n).item(), [p.grad for p in model.parameters()], probability / n


@pytest.mark.parametrize(("name", "options", "formula"), FORMULAS, ids=lambda value: getattr(value, "__name__", None))
def test_value_and_gradient_by_hand(name, options, formula):
    """sum w l / sum w over the optimizer step, in one micro-batch or several of different weight (ms-swift#10100)."""
    loss = create_loss(name, **options)
    made = prepared(loss, weighted=True)
    value, gradients, probability = by_hand(name, options, formula, made)
    for parts in ([range(N)], [range(1), range(1, 6), range(6, N)]):
        batches = [collated(made, [[i] for i in part]) for part in parts]
        got = step(loss, batches)
        assert got[0] == pytest.approx(value, rel=1e-6)
        for ours, theirs in zip(got[1], gradients, strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    output = loss(collated(made, [[i] for i in range(N)]), models_for(loss))
    means = {key: (total / n).item() for key, (total, n) in output.metrics.items()}
    assert means["avg_p_correct"] == pytest.approx(probability, rel=1e-5)
    if name == "kd":
        assert 0.7 * 16 * means["kl"] + 0.3 * means["nll"] == pytest.approx(value, rel=1e-5)


# ------------------------------------------------------------------------------------------------ from rows to a loss


def weigh(rows: list[dict], *pairs: tuple[str, float]) -> list[dict]:
    """The rows with these keys and values in turns of the assistant, the last pair in the last one of each row."""
    rows = copy.deepcopy(rows)
    for row in rows:
        answers = [turn for turn in row["messages"] if turn["role"] == "assistant"]
        for turn, (key, weight) in zip(reversed(answers), itertools.chain(reversed(pairs), itertools.repeat(pairs[0]))):
            turn[key] = weight
    return rows


PLAIN = [
    {"messages": [{k: v for k, v in turn.items() if k != "weight"} for turn in row["messages"]]}
    for row in conversations()
]


@pytest.mark.parametrize("name", ["sft", "dft"])
def test_weight_0_is_a_turn_that_is_not_trained_on(turns, name):
    """By any of its names, and the same for all turns is as good as none."""
    last = first_step(turns(PLAIN, "train_on=last_turn", f"loss.name={name}"))
    for key, value in (("weight", 0), ("train", False), ("loss_weight", 0.0)):
        trainer = turns(weigh(PLAIN, (key, value), (key, 1)), f"loss.name={name}")
        assert TARGET_WEIGHTS not in trainer.train_loader.examples.caches[0].token_features
        assert_same(first_step(trainer), last)
    same = first_step(turns(weigh(PLAIN, ("weight", 0.25)), f"loss.name={name}"))
    assert_same(same, first_step(turns(PLAIN, f"loss.name={name}")))


@pytest.mark.parametrize("options", [(), ("packing=true",), ("gradient_accumulation_steps=4",), ("loss.name=kd",)])
def test_rows_without_weights_count_1(turns, tmp_path, options):
    """In a file in which other rows have weights, and in another file: a turn of weight 2 counts twice."""
    options = (*options, "loss.teacher=tiny") if "loss.name=kd" in options else options
    weighted = weigh(PLAIN[:2], ("weight", 2))
    other = written(tmp_path / "other.jsonl", PLAIN[5:])
    trainer = turns([*PLAIN[2:5], *weighted], *options)
    trainer = turns([*PLAIN[2:5], *weighted], *options, f"datasets=[{trainer.config.datasets[0].path}, {other}]")
    twice = turns([*PLAIN, *PLAIN[:2]], *options, "total_batch_size=10", "gradient_accumulation_steps=1")
    assert_same(first_step(trainer), first_step(twice))


def test_weights_in_an_evaluation(turns, tmp_path):
    """Loss, perplexity and avg_p_correct are weighted means, whether or not the training data have weights."""
    rows = weigh(PLAIN, ("weight", 0.5), ("weight", 3))
    file = written(tmp_path / "held-out.jsonl", rows)
    trainer = turns(PLAIN, f"eval_datasets=[{file}]", "eval_batch_size=3")
    w, logps = [], []
    with torch.no_grad():
        for batch in trainer.eval_loader.eval_batches():
            w.append(batch.target_weights.double())
            logps.append(trainer.policy(batch).logps.double())
    w, logps = torch.cat(w), torch.cat(logps)
    found = trainer.evaluate()
    assert set(w.tolist()) == {0.5, 3}
    assert found["perplexity"] == pytest.approx(math.exp(-(w * logps).sum() / w.sum()), rel=1e-5)
    assert found["avg_p_correct"] == pytest.approx(((w * logps.exp()).sum() / w.sum()).item(), rel=1e-5)
    assert found["loss"] == pytest.approx(math.log(found["perplexity"]), rel=1e-5)


class Squares(Loss):
    """A loss of a user, which uses weights or not."""

    def num_items(self, batch):
        return batch.targets.new_tensor(batch.n_targets if batch.target_weights is None else batch.target_weights.sum())

    def __call__(self, batch, models):
        losses = models.policy(batch).logps ** 2
        w = torch.ones_like(losses) if batch.target_weights is None else batch.target_weights
        return LossOutput((w * losses).sum(), w.sum(), {})


class SquaresOfTokens(TokenLoss):
    def __call__(self, batch, models):
        logps = models.policy(batch).logps
        return self.output(logps**2, batch, logps)


def test_a_loss_of_a_user(turns):
    """One that does not say that it uses weights refuses them; a subclass of TokenLoss does use them."""
    rows = weigh(PLAIN, ("weight", 0.5), ("weight", 3))
    with raises(DataError, "no-effect", ".jsonl: "):
        turns(rows, loss=Squares(SFTOptions()))
    turns(weigh(PLAIN, ("weight", 0), ("weight", 1)), loss=Squares(SFTOptions()))

    class Weighted(Squares):
        uses_target_weights = True

        def num_items(self, batch):
            return batch.target_weights.sum()

    assert_same(
        first_step(turns(rows, loss=Weighted(SFTOptions()))),
        first_step(turns(rows, loss=SquaresOfTokens(SFTOptions()))),
    )


def test_preferences_refuse_weights(make_trainer, tmp_path):
    """A pair is one unit. 0 and 1 say which turns belong to a response."""

    def rows(weight) -> str:
        chosen = [{"role": "assistant", "content": "a", "weight": weight}, {"role": "user", "content": "more"}]
        chosen = [{"role": "user", "content": "q"}, *chosen, {"role": "assistant", "content": "b"}]
        rejected = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "c"}]
        row = {"chosen_messages": chosen, "rejected_messages": rejected}
        return f"datasets=[{written(tmp_path / 'pairs.jsonl', [row] * 8)}]"

    settings = ("loss.name=dpo", "loss.reference_free=true")
    with raises(DataError, "no-effect", "pairs.jsonl:1: "):
        make_trainer(rows(0.5), *settings)
    found = [make_trainer(rows(w), *settings).train_loader.examples[0][0].mask.sum().item() for w in (0, 1, True)]
    assert found == [2, 4, 4]  # each with the token that ends it


def test_other_weights_are_other_data(turns, tmp_path):
    """A ledger line and the identity of a run tell weights apart; a run is not resumed with others."""
    versions = [PLAIN, weigh(PLAIN, ("weight", 0.5), ("weight", 1)), weigh(PLAIN, ("weight", 2), ("weight", 1))]
    versions += [weigh(PLAIN, ("weight", 0), ("weight", 1)), weigh(PLAIN, ("weight", 1))]
    digests = [turns(rows).train_loader.examples.digest(np.arange(8)) for rows in versions]
    assert len(set(digests)) == 4 and digests[0] == digests[-1]
    options = ("exp_name=run", "save_every_steps=1", "n_steps=2")
    trainer = turns(PLAIN, *options, on_step_end=lambda t: setattr(t, "_received", 15) if t.step == 1 else None)
    trainer.train()
    file = trainer.config.datasets[0].path
    written(Path(file), versions[1])
    with raises(RunError, "other-run", "allow_changes=[datasets]"):
        turns(PLAIN, *options, f"datasets=[{file}]").train()


@pytest.mark.parametrize("weight", [-1, 1e-50, 1e39, math.nan, math.inf, "1", None, [1]])
def test_weights_that_are_none(turns, weight):
    """What float32 does not hold would divide by 0, or make the loss infinite; null is what tables fill in."""
    rows = weigh(PLAIN, ("weight", weight))
    if weight is None:
        turns(rows)
    else:
        with raises(DataError, "invalid-row", ".jsonl:1: messages[1].weight: "):
            turns(rows)
