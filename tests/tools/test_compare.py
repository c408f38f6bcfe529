"""`minitrain compare`: at which step two runs part, and in what."""

import json
from pathlib import Path

import pytest
import torch

from minitrain.cli.main import main
from minitrain.tools.analysis.compare import LedgerStep, read_ledger
from minitrain.tools.analysis.compare import compare as report_on
from tests.conftest import metrics
from tests.messages import reports

pytestmark = pytest.mark.numeric


@pytest.fixture
def compare(tmp_path, capsys):
    """``compare("a", "b")``: (exit code, what is printed) for two runs of the test's folder."""

    def run(first: str, second: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["compare", str(tmp_path / "runs" / first), str(tmp_path / "runs" / second)])
        out, err = capsys.readouterr()
        return code, out + err

    return run


@pytest.fixture
def train(make_trainer):
    """``train("name", "lr=0.1", ...)``: a trained trainer."""

    def run(name: str, *overrides: str, **hooks):
        trainer = make_trainer(f"exp_name={name}", *overrides, **hooks)
        trainer.train()
        return trainer

    return run


def verdict(told: str) -> str:
    return told.strip().splitlines()[-1]


def test_a_step_is_noted_to_the_last_bit(train):
    """The loss and gradient norm of metrics.jsonl, which are of a single step where each is logged."""
    trainer = train("a")
    ledger = read_ledger(trainer.run.path)
    assert list(ledger) == [1, 2, 3] and len({step.tokens for step in ledger.values()}) == 3
    for row in metrics(trainer):
        assert ledger[row["step"]].grad_norm == row["grad_norm"]
        assert ledger[row["step"]].loss == pytest.approx(row["loss"], rel=1e-6)


def test_the_same_training_twice(train, compare):
    """Exit code 0, though the runs have other names and one was ended earlier."""
    train("a"), train("b", "n_steps=2", "lr_scheduler=constant", "report_to_tensorboard=true")
    train("c", "lr_scheduler=constant")
    code, told = compare("b", "c")
    assert code == 0 and verdict(told) == "The runs are identical in all 2 common steps."
    assert "n_steps                2 -> 3" in told and "exp_name" not in told
    assert "a: " in told and "steps 1 to 2" in told and "steps 1 to 3" in told


def test_another_layout_has_the_same_tokens(train, compare):
    """Packed and in micro-batches: the hash is that of the examples, however they lie in rows."""
    train("a"), train("b", "packing=true", "gradient_accumulation_steps=4")
    _, told = compare("a", "b")
    assert "tokens         bit-identical in 3 steps" in told
    assert "more than rounding error" not in verdict(told).replace("no more than rounding error", "")
    assert "packing" in told and "false -> true" in told


def test_a_difference_in_the_last_bits_is_rounding(train, compare):
    """A processor may make none at all between two layouts, so one is put into the ledger."""
    train("a")
    file = train("b").run.path / "ledger.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["loss"] *= 1 + 2**-22
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, told = compare("a", "b")
    assert code == 1 and "tokens         bit-identical in 3 steps" in told
    assert "step 1" in verdict(told) and "no more than rounding error" in verdict(told)


def test_another_learning_rate_shows_a_step_later(train, compare):
    """The first step's loss and gradient are the same; the update after them was not."""
    train("a"), train("b", "lr=0.02")
    code, told = compare("a", "b")
    assert code == 1 and "loss           first differs at step 2" in told
    assert "the update of step 1" in verdict(told) and "more than rounding error" in verdict(told)
    assert "lr  0.01 -> 0.02" in told


def test_another_order_of_data(train, compare):
    train("a"), train("b", "seed=1")
    code, told = compare("a", "b")
    assert code == 1 and "From step 1 on the runs trained on different data" in verdict(told)
    assert "tokens         first differ at step 1, and in 3 of 3 steps" in told


def test_data_that_part_later(train, compare, tmp_path, rows_file):
    """One answer of 40 is another: named is the step that had it."""
    rows = rows_file.read_text().splitlines()
    rows[7] = json.dumps({"prompt": "say 7", "response": "ba"})
    (tmp_path / "other.jsonl").write_text("\n".join(rows))
    seen = []
    train("a", "n_steps=5", on_step_end=lambda t: seen.append(7 in t.indices))
    train("b", "n_steps=5", f"datasets=[{tmp_path / 'other.jsonl'}]")
    _, told = compare("a", "b")
    assert f"From step {seen.index(True) + 1} on the runs trained on different data" in verdict(told)


def test_a_loss_that_is_another_from_the_start(train, compare):
    train("a"), train("b", "loss.name=dft")
    code, told = compare("a", "b")
    assert code == 1 and "At step 1, the first, the data is the same, but the loss differs by more than" in verdict(
        told
    )


def test_another_gradient_of_the_same_loss(train, compare):
    """As a wrong backward pass makes it: twice the gradient in step 2."""

    def double(trainer):
        if trainer.step == 1:
            parameter = trainer.parameters[0]
            parameter.register_hook(lambda gradient: 2 * gradient)

    train("a"), train("b", on_step_end=double)
    _, told = compare("a", "b")
    assert "At step 2 the data and the loss are the same, but the gradient differs by more than" in verdict(told)


def test_a_resumed_run_has_the_ledger_of_an_uninterrupted_one(train, compare):
    """Lines behind the checkpoint are dropped when a run goes on, so that none stands there twice."""

    def stop(trainer):
        trainer.should_stop = trainer.step == 4

    train("a", "n_steps=6", "save_every_steps=3")
    cut = train("b", "n_steps=6", "save_every_steps=3", on_step_end=stop)
    assert list(read_ledger(cut.run.path)) == [1, 2, 3, 4]
    (cut.run.path / "run.json").unlink()
    whole = train("b", "n_steps=6", "save_every_steps=3")
    assert compare("a", "b")[0] == 0
    assert len((whole.run.path / "ledger.jsonl").read_text().splitlines()) == 6


def test_steps_without_a_number(tmp_path, compare):
    """NaN beside NaN is the same; beside a number it is the largest difference there is."""
    for name, losses in (("a", ["nan", 1.0, "inf"]), ("b", ["nan", "nan", "inf"])):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        rows = [{"step": i, "tokens": "x", "loss": loss, "grad_norm": 1.0} for i, loss in enumerate(losses, 1)]
        (folder / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "tok')
    code, told = compare("a", "b")
    assert code == 1 and "loss           first differs at step 2: 1 and nan, a relative difference of inf" in told
    assert "gradient norm  bit-identical in 3 steps" in told and "config.yml cannot be read" in told


def test_a_skipped_step_is_noted_too(train, make_trainer):
    """A NaN that is kept from the weights stands in the ledger as a text."""

    def spoil(trainer):
        if trainer.step == 1:
            trainer.loss.num_items = lambda batch: torch.tensor(float("nan"))

    trainer = train("a", on_step_end=spoil)
    assert [step.loss == step.loss for step in read_ledger(trainer.run.path).values()] == [True, False, False]


def test_without_a_ledger(train, compare, tmp_path, monkeypatch):
    """ledger=false writes none, and a folder without one is told in a line; so is one that cannot be written."""
    train("a", "ledger=false"), train("b")
    assert not (tmp_path / "runs" / "a" / "ledger.jsonl").exists()
    code, told = compare("b", "a")
    assert code == 2 and reports(told, "not-found", "runs/a: ", "ledger.jsonl")
    assert reports(compare("b", "c")[1], "not-found", "runs/c: ")
    (tmp_path / "runs" / "a" / "ledger.jsonl").write_text("")
    assert reports(compare("a", "b")[1], "no-data", "ledger.jsonl: ")
    late = {"step": 9, "tokens": "x", "loss": 1.0, "grad_norm": 1.0}
    (tmp_path / "runs" / "a" / "ledger.jsonl").write_text(json.dumps(late))
    assert reports(compare("a", "b")[1], "mismatch")


def test_a_ledger_that_cannot_be_written_stops_nothing(make_trainer, tmp_path, capsys):
    """Its place is taken by a folder: one warning, and the training ends well."""
    trainer = make_trainer("exp_name=a")
    trainer.run.path.mkdir(parents=True)
    (trainer.run.path / "ledger.jsonl" / "x").mkdir(parents=True)
    trainer.train()
    assert capsys.readouterr().out.count("warning: ledger.jsonl failed and is switched off") == 1
    assert Path(trainer.run.final).is_dir()


def test_steps_are_read_as_they_were_written(tmp_path):
    row = {"step": 1, "tokens": "ab", "loss": 0.1 + 0.2, "grad_norm": 1e-30}
    (tmp_path / "ledger.jsonl").write_text(json.dumps(row))
    assert read_ledger(tmp_path) == {1: LedgerStep("ab", 0.30000000000000004, 1e-30)}


def test_an_older_name_of_an_option_is_no_difference(train, compare, tmp_path):
    """The config.yml of a run may have either name of it."""
    train("a", "loss={name: sft, label_smoothing: 0.1}"), train("b", "loss={name: sft, label_smoothing: 0.1}")
    config = tmp_path / "runs" / "b" / "config.yml"
    text = config.read_text()
    assert "total_batch_size: 8" in text
    config.write_text(text.replace("total_batch_size: 8", "batch_size: 8"))
    code, told = compare("a", "b")
    assert code == 0 and "options: the same" in told


def test_rewards_of_online_runs(tmp_path):
    """Those of the first and the last third, where both runs have rounds."""
    for name, gain in (("a", 0.1), ("b", 0.0)):
        (tmp_path / name).mkdir()
        ledger = {"step": 1, "tokens": "x", "loss": 1.0, "grad_norm": 1.0}
        (tmp_path / name / "ledger.jsonl").write_text(json.dumps(ledger) + "\n")
        rounds = [{"step": i, "kind": "rollout", "reward": 0.25 + gain * i} for i in range(6)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rounds))
    lines = report_on(tmp_path / "a", tmp_path / "b").lines()
    (line,) = (line for line in lines if line.startswith("reward "))
    assert "a 0.3 to 0.7 in 6 rounds; b 0.25 to 0.25 in 6 rounds" in line
    (tmp_path / "b" / "metrics.jsonl").unlink()
    assert not any(line.startswith("reward ") for line in report_on(tmp_path / "a", tmp_path / "b").lines())
