"""kl_to_start and retention_datasets: what evaluations compute besides the loss."""

import json

import pytest
import torch

from minitrain import ConfigError, Trainer
from minitrain.model.tiny import tiny_tokenizer
from minitrain.training.aux_models import FrozenModel, InitialPolicySnapshot
from tests.conftest import metrics, random_llama
from tests.messages import raises

pytestmark = pytest.mark.numeric


@pytest.fixture
def kept(tmp_path) -> str:
    """Rows that the training does not see."""
    file = tmp_path / "kept.jsonl"
    file.write_text("".join(json.dumps({"text": f"the {word} is here"}) + "\n" for word in ("cat", "owl", "deer")))
    return str(file)


def logps(model, batch) -> torch.Tensor:
    """Log-probabilities [N, V] at the targets, in float64 from the logits of transformers."""
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    with torch.no_grad():
        return model(**inputs).logits.double().log_softmax(-1).flatten(0, 1)[batch.predict_positions]


def kl_in_float64(trainer, loader) -> float:
    total = n = 0
    start = trainer.models.start
    trainer.policy.eval()
    for batch in loader.eval_batches():
        ours = logps(trainer.generator.model, batch)
        if isinstance(start, InitialPolicySnapshot):
            with start.restored():
                theirs = logps(trainer.generator.model, batch)
        else:
            theirs = logps(start.policy.model, batch)
        total, n = total + float((ours.exp() * (ours - theirs)).sum()), n + len(ours)
    return total / n


SETTINGS = ["eval_kl_to_start=true", "validation_split=0.3", "model.name_or_path=tiny"]


@pytest.mark.parametrize(
    "options, kind",
    [
        ([], FrozenModel),
        (["lora.rank=2"], InitialPolicySnapshot),
        (["lora.rank=2", "lora.modules_to_save=[lm_head]"], InitialPolicySnapshot),
        (["lora.rank=2", "packing=true", "loss={name: kd, teacher: tiny}"], InitialPolicySnapshot),
    ],
)
def test_kl_to_start(make_trainer, kept, options, kind):
    """0 before the first step; then the mean over all targets, as plain loops have it in float64."""
    trainer = make_trainer(*SETTINGS, f"retention_datasets={kept}", *options)
    assert isinstance(trainer.models.start, kind)
    trainer.train()
    before, after = metrics(trainer, "eval")
    assert before["kl_to_start"] == pytest.approx(0, abs=1e-7) == before["retention/kl_to_start"]
    if "packing=true" in options:  # the oracle reads rows of one document
        return
    for prefix, loader in (("", trainer.eval_loader), ("retention/", trainer.retention_loader)):
        assert after[f"{prefix}kl_to_start"] == pytest.approx(kl_in_float64(trainer, loader), rel=1e-4) != 0


def test_packing_changes_nothing(make_trainer, kept):
    """The metrics after the same training on padded rows."""
    rows = []
    for number, packing in enumerate(("false", "true")):
        options = [f"packing={packing}", f"exp_name={number}", "lora.rank=2", f"retention_datasets={kept}"]
        trainer = make_trainer(*SETTINGS, *options)
        trainer.train()
        rows.append(trainer.eval_metrics)
    for name in ("kl_to_start", "retention/kl_to_start", "retention/loss"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-3)


def test_the_start_of_a_loaded_adapter_is_the_adapter(make_trainer):
    """Not the base model under it (as for the reference of dpo)."""
    first = make_trainer("lora.rank=2", "exp_name=first", "model.name_or_path=tiny")
    first.train()
    trainer = make_trainer(*SETTINGS, f"model.adapter={first.run.final}")
    assert trainer.evaluate()["kl_to_start"] == pytest.approx(0, abs=1e-6)


def test_a_resumed_run_has_the_same_start(make_trainer):
    """The adapter before the first step, not that of the checkpoint."""
    options = [*SETTINGS, "lora.rank=2", "n_steps=4", "save_every_steps=2"]
    straight = make_trainer(*options, "exp_name=straight")
    straight.train()
    stopped = make_trainer(*options, on_step_end=lambda t: setattr(t, "should_stop", t.step == 2))
    stopped.train()
    (stopped.run.path / "run.json").unlink()
    resumed = make_trainer(*options)
    resumed.train()
    assert resumed.eval_metrics["kl_to_start"] == pytest.approx(straight.eval_metrics["kl_to_start"], rel=1e-5)


def test_the_reference_of_the_loss_is_the_start(make_trainer, tmp_path):
    """No second copy is in memory, and retention data are conversations, whatever the loss trains on."""
    rows = [{"prompt": f"say {i}", "chosen": "a", "rejected": "bb"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [f"datasets=[{tmp_path / 'pairs.jsonl'}]", "loss={name: dpo, reference: model}"]
    (tmp_path / "kept.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    trainer = make_trainer(*SETTINGS, *pairs, f"retention_datasets={tmp_path / 'kept.jsonl'}")
    assert trainer.models.start is trainer.models.reference and list(trainer.models.frozen()) == ["reference"]
    trainer.train()
    assert trainer.eval_metrics["kl_to_start"] > 0 and "rewards/margins" in trainer.eval_metrics


def test_retention_is_the_cross_entropy(make_trainer, kept):
    """That of an evaluation with sft on the same rows; the training does not change by it."""
    trainer = make_trainer("validation_split=0.3", f"retention_datasets={kept}", "loss.name=dft")
    plain = make_trainer("validation_split=0.3", f"eval_datasets={kept}", "exp_name=plain", "validation_split=0")
    expected = plain.evaluate()
    found = trainer.evaluate()
    for name in ("loss", "perplexity"):
        assert found[f"retention/{name}"] == pytest.approx(expected[name], rel=1e-6)
    rows = [{"prompt": "a", "response": "b"}]  # of a call in Python, which has data of its own
    assert "retention/loss" not in trainer.evaluate(rows)


def test_the_best_model_by_retention(make_trainer, kept):
    """Lower is better, and the metric is known before the first step."""
    options = ["early_stopping={metric: retention/loss, patience: 1}", "eval_every_steps=1", "n_steps=5"]
    trainer = make_trainer("validation_split=0.3", f"retention_datasets={kept}", *options)
    trainer.train()
    losses = [row["retention/loss"] for row in metrics(trainer, "eval")]
    assert trainer.best == min(losses)


@pytest.mark.parametrize(
    "options, key, code",
    [
        (["eval_kl_to_start=true"], "eval_kl_to_start", "no-effect"),
        (["retention_datasets=KEPT"], "retention_datasets", "no-effect"),
        (["validation_split=0.3", "retention_datasets=nowhere.jsonl"], "retention_datasets[0].path", "not-found"),
        (
            ["validation_split=0.3", "retention_datasets=[{path: KEPT, weight: 2}]"],
            "retention_datasets[0]",
            "no-effect",
        ),
        (
            ["validation_split=0.3", "retention_datasets=[{path: KEPT, type: preference}]"],
            "retention_datasets[0].type",
            "mismatch",
        ),
        (["validation_split=0.3", "loss.name=classify", "eval_kl_to_start=true"], "eval_kl_to_start", "conflict"),
        (
            [*SETTINGS, "loss.name=policy", "rollout={num_generations: 2, rewards: [length]}"],
            "eval_kl_to_start",
            "no-effect",
        ),
    ],
)
def test_what_is_refused(make_trainer, kept, wording, options, key, code):
    with raises(ConfigError, code, key) as caught:
        make_trainer(*(option.replace("KEPT", kept) for option in options))
    wording(caught.value)


def test_a_model_from_python_has_no_second_copy(rows_file, tmp_path):
    """Its start is known with an adapter alone."""
    config = {"datasets": [str(rows_file)], "validation_split": 0.3, "eval_kl_to_start": True, "exp_name": "python"}
    config |= {"output_dir": str(tmp_path)}
    given = {"model": random_llama(), "tokenizer": tiny_tokenizer()}
    with raises(ConfigError, "conflict", "eval_kl_to_start"):
        Trainer(config, **given)
    trainer = Trainer(config | {"lora": {"rank": 2}}, **given)
    assert trainer.evaluate()["kl_to_start"] == pytest.approx(0, abs=1e-6)


def test_the_model_card_has_the_numbers_before_training(make_trainer):
    """Beside those of the model, also after a resume."""
    trainer = make_trainer("validation_split=0.3", "save_every_steps=1", "lr=0.1")
    trainer.train()
    before, after = metrics(trainer, "eval")
    card = (trainer.run.final / "README.md").read_text()
    assert f"| eval loss | {before['loss']:.6g} | {after['loss']:.6g} |" in card
    assert "| train loss |  |" in card
