"""Classification in the trainer: figures, recomputation, frozen layers, adapters, the best model, resuming."""

import json
import random

import numpy as np
import pytest
import torch
import transformers as tf

from minitrain import ConfigError, DataError, Trainer, load_config
from minitrain.cli.main import main
from tests.conftest import metrics, weights
from tests.messages import raises
from tests.model.test_sequence_head import close
from tests.scorers import random_base

COLOURS = ("red", "blue", "green")


@pytest.fixture(scope="session")
def colours_file(tmp_path_factory):
    """48 texts whose colour is their label; every other one is a pair."""
    rng, rows = random.Random(0), []
    for i in range(48):
        label = COLOURS[i % 3]
        row = {"text": f"{rng.choice(['my', 'the', 'a nice'])} {label} {rng.choice(['cat', 'house'])}", "label": label}
        rows.append(row | ({"text_pair": "is it so?"} if i % 2 else {}))
    file = tmp_path_factory.mktemp("colours") / "colours.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def make(tmp_path, colours_file):
    """A trainer over a random model of a kind, or the embedded one."""

    def made(kind: str, *overrides: str, **hooks) -> Trainer:
        folder = tmp_path / kind
        if kind != "tiny" and not folder.exists():
            random_base(kind, folder)
        base = {
            "datasets": [str(colours_file)],
            "model": {"name_or_path": kind if kind == "tiny" else str(folder)},
            "loss": {"name": "classify"},
            "output_dir": str(tmp_path / "runs"),
            "exp_name": "run",
            "total_batch_size": 8,
            "max_length": 64,
            "n_steps": 3,
            "lr": 1e-3,
            "log_every_steps": 1,
        }
        return Trainer(load_config(base, list(overrides)), **hooks)

    return made


def still(trainer: Trainer) -> Trainer:
    """Without dropout."""
    for module in trainer.policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return trainer


@pytest.mark.parametrize(
    "lora", [(), ("lora.rank=4", "lora.target_modules=all-linear", "lr=2e-2")], ids=["all", "lora"]
)
def test_a_run_with_several_labels(make, tmp_path, capsys, lora):
    """It learns both labels; transformers knows what the outputs mean, and `score` prints all that are likely."""
    rows = [
        {
            "text": f"{'red' * (i % 2)} {'big' * (i // 2 % 2)} thing {i}",
            "labels": ["red"] * (i % 2) + ["big"] * (i // 2 % 2),
        }
        for i in range(48)
    ]
    (tmp_path / "tags.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"datasets=[{tmp_path / 'tags.jsonl'}]"
    trainer = make("tiny", data, "loss.multi_label=true", "validation_split=8", "n_steps=40", "lr=1e-2", *lora)
    ended = trainer.train()
    assert ended["f1_micro"] > 0.9 and {"f1_macro", "accuracy"} <= ended.keys() and "hits/0" not in ended
    assert {"f1_micro", "accuracy"} <= metrics(trainer)[-1].keys()
    if not lora:
        model = tf.AutoModelForSequenceClassification.from_pretrained(trainer.run.final)
        assert model.config.problem_type == "multi_label_classification"
    capsys.readouterr()
    assert main(["score", str(trainer.run.final), "--text", "red big thing 9", " big thing 8"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [set(line[0].split(", ")) for line in lines] == [{"red", "big"}, {"big"}]
    assert all(line[1].startswith("big 0.") and ", red 0." in line[1] for line in lines)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "llama"])
def test_a_run(make, kind):
    """It learns; train lines have accuracy, eval lines all figures; final/ says in transformers' hands what the
    trainer's own evaluation says."""
    trainer = make(kind, "validation_split=12", "n_steps=60", "lr=3e-3", "log_every_steps=10")
    ended = trainer.train()
    assert {"accuracy", "loss"} <= metrics(trainer)[-1].keys()
    assert {"loss", "accuracy", "f1", "precision", "recall", "matthews"} <= ended.keys()
    assert ended["loss"] < 0.85 * metrics(trainer, "eval")[0]["loss"]
    model = tf.AutoModelForSequenceClassification.from_pretrained(trainer.run.final).eval()
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    nll, hits = 0.0, 0.0
    for batch in trainer.eval_loader.eval_batches():
        inputs = {"input_ids": batch.input_ids, "attention_mask": (batch.doc_ids >= 0).long()}
        if kind == "bert":
            inputs["token_type_ids"] = batch.token_features["token_types"].long()
        logits, labels = model(**inputs).logits, batch.doc_features["label"].long()
        nll += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item() / 12
        hits += (logits.argmax(1) == labels).sum().item() / 12
    assert (nll, hits) == pytest.approx((ended["loss"], ended["accuracy"]), rel=1e-5)
    with raises(ConfigError, "unsupported-model"):
        trainer.predict(["a"])
    assert trainer.evaluate() == pytest.approx({k: v for k, v in ended.items() if k != "seconds"}, abs=1e-6)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "gpt2"])
def test_recomputed_activations_and_micro_batches(make, kind):
    """The same training with activation checkpointing, or in micro-batches."""
    sgd = ("optimizer=SGD", "lr=1e-2")
    plain = still(make(kind, *sgd))
    plain.train()
    for number, option in enumerate(("activation_checkpointing=true", "gradient_accumulation_steps=4")):
        other = still(make(kind, *sgd, option, f"exp_name=other-{number}"))
        other.train()
        for name, p in weights(plain).items():
            close(weights(other)[name], p, 1e-5)


def test_frozen_layers(make):
    """Blocks and embeddings of an encoder stay; its head and the rest move."""
    trainer = make("bert", "freeze_layers=[0, embeddings]")
    before = weights(trainer)
    trainer.train()
    for name, p in weights(trainer).items():
        frozen = "layer.0." in name or "word_embeddings" in name
        assert torch.equal(p, before[name]) == frozen, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_compiled_blocks(make, kind):
    """compile=true trains what is trained without."""
    plain, compiled = still(make(kind)), still(make(kind, "compile=true", "exp_name=compiled"))
    plain.train()
    compiled.train()
    assert compiled.train_metrics["loss"] == pytest.approx(plain.train_metrics["loss"], rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        ["lora.rank=4", "lora.target_modules=[query,value]"],
        ["lora.rank=4", "lora.init=pissa", "packing=true"],
        ["soft_prompt.num_virtual_tokens=4"],
        ["soft_prompt.num_virtual_tokens=4", "soft_prompt.method=prefix"],
    ],
    ids=["query-value", "pissa", "prompt", "prefix"],
)
def test_adapters(make, options, dtype):
    """The base stays, the adapter and the head move; what was saved and is trained on begins where it ended."""
    kind = "bert" if "query" in options[-1] else "llama"
    first = make(kind, *options, "validation_split=12", f"model.policy_dtype={dtype}", "exp_name=first", "lr=1e-2")
    before = weights(first)
    ended = first.train()
    for name, p in weights(first).items():
        trained = any(part in name for part in ("lora", "soft_prompt", "score", "classifier", "pooler"))
        assert torch.equal(p, before[name]) != trained, name
        assert p.dtype == (torch.float32 if trained else getattr(torch, dtype))
    packing = [option for option in options if "packing" in option]
    options = [*packing, "validation_split=12", f"model.policy_dtype={dtype}", "exp_name=second"]
    second = make(kind, *options, f"model.adapter={first.run.final}", "seed=0")
    assert second.evaluate()["loss"] == pytest.approx(ended["loss"], rel=1e-5 if dtype == "float32" else 1e-2)


def test_interrupted_and_resumed(make):
    """Bit for bit, with dropout."""
    options = ("n_steps=4", "save_every_steps=2")
    whole = make("bert", *options, "exp_name=whole")
    whole.train()
    make("bert", *options, on_step_end=lambda t: setattr(t, "_received", 15) if t.step == 2 else None).train()
    again = make("bert", *options)
    again.train()
    assert all(torch.equal(p, weights(again)[name]) for name, p in weights(whole).items())


def test_the_best_model_by_f1(make):
    """early_stopping.metric may be any figure of the evaluation, and more of it is better."""
    seen = []
    options = ("early_stopping.metric=f1", "save_best=true", "eval_every_steps=5", "n_steps=20", "validation_split=12")
    trainer = make("tiny", *options, "lr=1e-2", on_eval_end=lambda t: seen.append(t.eval_metrics["f1"]))
    trainer.train()
    assert trainer.best == max(seen) > seen[0]
    assert tf.AutoModelForSequenceClassification.from_pretrained(trainer.run.best).config.num_labels == 3


def test_regression(make, tmp_path):
    """Numbers as labels: one output, the mean squared error, and correlations."""
    rows = [{"sentence1": "ab" * (i % 7), "sentence2": "c", "label": (i % 7) / 2} for i in range(40)]
    file = tmp_path / "lengths.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = (f"datasets=[{file}]", "loss.regression=true", "validation_split=10", "n_steps=60", "lr=1e-2")
    trainer = make("tiny", *options, "log_every_steps=60")
    ended = trainer.train()
    assert ended["pearson"] > 0.8 and ended["spearman"] > 0.8 and "accuracy" not in ended
    model = tf.AutoModelForSequenceClassification.from_pretrained(trainer.run.final)
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    scores = []
    for batch in trainer.eval_loader.eval_batches():
        with torch.no_grad():
            scores += zip(
                trainer.policy.eval()(batch).scores[:, 0].tolist(), batch.doc_features["label"].tolist(), strict=True
            )
    outputs, labels = np.array(scores).T
    assert ended["loss"] == pytest.approx(((outputs - labels) ** 2).mean(), rel=1e-5)
    assert ended["pearson"] == pytest.approx(np.corrcoef(outputs, labels)[0, 1], abs=1e-6)


def test_a_label_that_training_has_not(make, tmp_path):
    """Told with its file before the model is loaded, and a text that is cut is told at the start."""
    other = tmp_path / "held.jsonl"
    other.write_text('{"text": "a pink cat", "label": "pink"}\n')
    with raises(DataError, "mismatch", "held.jsonl: ", "'pink'", "blue, green, red"):
        make("tiny", f"eval_datasets=[{other}]")
    notes = make("tiny", "max_length=12").notes
    assert any("truncated examples" in note for note in notes)
