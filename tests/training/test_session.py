"""`Session`: the numbers of `Trainer` on the same examples, from a loop of the caller."""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from minitrain import ConfigError, DataError, RunError, Sampling, Session, Trainer, create_loss
from minitrain.config.schema import Config, option_fields
from minitrain.errors import RunDirError
from minitrain.tools.preflight.python import OF_SESSION
from tests.conftest import ROOT
from tests.messages import raises

pytestmark = pytest.mark.numeric
ROWS = [{"prompt": f"say {i}", "response": "ab" * (1 + i % 5)} for i in range(24)]
PAIRS = [{"prompt": f"say {i}", "chosen": "a" * (1 + i % 3), "rejected": "b"} for i in range(24)]
TINY = {"model": {"name_or_path": "tiny"}, "lr": 1e-2}


def trained(session):
    """A copy of the trained parameters."""
    return [parameter.detach().clone() for parameter in session.parameters]


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "gradient_accumulation_steps": 3},
        {"lora": {"rank": 2, "dropout": 0.1}, "max_tokens_per_micro_batch": 60},
        {"loss": {"name": "dpo"}},
        {"loss": {"name": "dpo"}, "lora": {"rank": 2}, "optimizer": "SGD"},
        {"loss": {"name": "dpo", "reference_sync_steps": 2, "reference_mixup": 0.5}},
    ],
    ids=["packing", "lora", "dpo", "dpo-lora", "moving-reference"],
)
def test_the_numbers_are_those_of_the_trainer(options, tmp_path):
    """The same loss, norm and weights, to the last bit: the layout of a step is the same, too."""
    rows = PAIRS if "loss" in options else ROWS
    run = {"output_dir": str(tmp_path), "exp_name": "run", "total_batch_size": 6, "lr_scheduler": "constant"}
    trainer = Trainer(TINY | options | run, train_dataset=rows)
    session = Session(TINY | options)
    steps = trainer.train_loader.steps()
    for _ in range(3):
        indices, batches = next(steps)
        random_state = torch.get_rng_state()  # of dropout
        output = trainer.forward_backward(batches)
        norm = trainer.optim_step()
        torch.set_rng_state(random_state)
        ours = session.forward_backward([rows[i] for i in indices])
        update = session.optim_step()
        assert ours.loss == output.loss and update.grad_norm == norm and update.taken
        assert ours.metrics() == output.metrics()
    assert all(map(torch.equal, trained(session), trained(trainer)))
    assert session.evaluate(rows) == trainer.evaluate(rows)


def test_rollouts_give_the_gradient_of_a_round(tmp_path):
    """Answers of `sample` with rewards, and a round of the trainer with the same answers."""
    rollout = {"num_generations": 4, "prompts_per_round": 4, "max_new_tokens": 6, "rewards": ["length"]}
    options = {"loss": {"name": "policy"}, "packing": True}
    run = {"output_dir": str(tmp_path), "exp_name": "run", "total_batch_size": 4, "n_steps": 1, "rollout": rollout}
    trainer = Trainer(TINY | options | run, train_dataset=[{"prompt": f"say {i}"} for i in range(4)])
    _, batches = next(trainer.train_loader.steps())
    output = trainer.forward_backward(batches)
    cache, rows = trainer.train_loader.examples.caches[0], []
    for first, stop in zip(cache.offsets[:-1], cache.offsets[1:], strict=True):
        start = first + int(cache.mask[first:stop].argmax())
        row = {"prompt_ids": cache.ids[first:start].tolist(), "response_ids": cache.ids[start:stop].tolist()}
        rows.append(row | {"reward": float(cache.doc_features["reward"][len(rows)])})
    session = Session(TINY | options)
    ours = session.forward_backward(rows)
    assert float(ours.loss) == pytest.approx(float(output.loss), abs=1e-6)
    for p, q in zip(session.parameters, trainer.parameters, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_samples_have_the_log_probabilities_of_the_policy():
    """The ratio of the loss is 1, and each prompt has its own responses, the first of which does not depend on n."""
    session = Session(TINY | {"loss": {"name": "policy"}})
    sampling = Sampling(max_new_tokens=6, temperature=1.0)
    groups = session.sample(["a", "b"], 3, sampling)
    assert [len(group) for group in groups] == [3, 3] and len({tuple(a.ids) for g in groups for a in g}) > 3
    rows = [answer.rollout(reward=i % 2) for i, answer in enumerate(groups[0] + groups[1])]
    metrics = session.forward_backward(rows).metrics()
    assert metrics["ratio"] == pytest.approx(1, abs=1e-4) and metrics["reward"] == 0.5
    again = Session(TINY | {"loss": {"name": "policy"}})
    assert [group[0].ids for group in again.sample(["a", "b"], 1, sampling)] == [group[0].ids for group in groups]
    assert len({tuple(answer.ids[:4]) for answer in session.sample(["a"], 4)[0]}) > 1  # temperature 1 by default
    greedy = session.sample(["a"], sampling=Sampling(max_new_tokens=4))
    assert [answer.text for (answer,) in greedy] == session.generator.generate(["a"], Sampling(max_new_tokens=4))


def test_calls_add_their_gradients():
    """Two calls before an update give the sum of their gradients; the update clears them."""
    session = Session(TINY)
    parts = []
    for rows in (ROWS[:5], ROWS[5:]):
        session.forward_backward(rows)
        parts.append([p.grad.clone() for p in session.parameters])
        session.optim_step(lr=0.0)
    assert all(p.grad is None for p in session.parameters)
    session.forward_backward(ROWS[:5])
    session.forward_backward(ROWS[5:])
    for p, first, second in zip(session.parameters, *parts, strict=True):
        torch.testing.assert_close(p.grad, first + second)


@pytest.mark.parametrize("options", [{}, {"lora": {"rank": 2, "dropout": 0.3}}], ids=["full", "lora"])
def test_a_loaded_session_goes_on_bit_for_bit(options, tmp_path):
    """Weights, moments, dropout and samples."""
    sampling = Sampling(max_new_tokens=4, temperature=1.0)

    def step(session):
        (answers,) = session.sample(["a"], 2, sampling)
        session.forward_backward(ROWS[: len(answers[0].ids) + 3])
        return [answer.ids for answer in answers], session.optim_step()

    session = Session(TINY | options)
    step(session)
    session.save(tmp_path / "state")
    expected = [step(session) for _ in range(2)]
    other = Session(TINY | options)
    other.load(tmp_path / "state")
    assert other.step == 1 and [step(other) for _ in range(2)] == expected
    assert all(map(torch.equal, trained(other), trained(session)))
    session.save(tmp_path / "state")  # replaces it
    other.load(tmp_path / "state")
    assert other.step == 3


def test_the_saved_model_is_loaded_by_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    session = Session(TINY)
    session.forward_backward(ROWS)
    session.optim_step()
    session.save_model(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in session.policy.model.state_dict().items())
    assert "tiny" in (tmp_path / "model" / "README.md").read_text()


def test_another_loss_for_a_call():
    """sft and dft on one session; one that needs a reference or another head is refused."""
    session = Session(TINY)
    assert session.forward_backward(ROWS, loss="dft").loss < session.forward_backward(ROWS).loss
    assert session.evaluate(ROWS, create_loss("dft"))["loss"] < session.evaluate(ROWS)["loss"]
    with raises(ConfigError, "conflict", "loss: ", "dpo", "reference"):
        session.forward_backward(PAIRS, loss="dpo")
    with raises(ConfigError, "conflict", "loss: ", "classify"):
        session.evaluate([{"text": "a", "label": "b"}], loss="classify")


def test_a_bad_step_changes_nothing():
    session = Session(TINY)
    before = trained(session)
    session.forward_backward(ROWS)
    session.parameters[0].grad.fill_(np.nan)
    assert not session.optim_step().taken and all(map(torch.equal, trained(session), before))


@pytest.mark.parametrize(
    "options, code, key",
    [
        ({"n_steps": 3, "datasets": ["a.jsonl"]}, "no-effect", "n_steps: "),
        ({"lr_scheduler": "cosine"}, "no-effect", "lr_scheduler: "),
        ({"lr": "fast"}, "wrong-type", "lr: "),
        ({"loss": {"name": "dpo", "reference": "precomputed"}}, "conflict", "loss.reference: "),
    ],
)
def test_options_of_another_loop_are_refused(options, code, key, wording):
    with raises(ConfigError, code, key) as error:
        Session(TINY | options)
    wording(str(error.value))


def test_options_that_a_session_uses_exist():
    assert {f.name for f in option_fields(Config)} >= OF_SESSION


def test_wrong_calls(tmp_path, wording):
    session = Session(TINY | {"loss": {"name": "policy"}})
    messages = []
    for error, code, call in [
        (RunError, "usage", lambda: session.optim_step()),
        (ConfigError, "mismatch", lambda: session.sample(["a"], sampling=Sampling(temperature=0.5))),
        (ConfigError, "wrong-type", lambda: session.sample("a")),
        (ConfigError, "wrong-type", lambda: session.forward_backward("rows.jsonl")),
        (DataError, "invalid-row", lambda: session.forward_backward([{"prompt_ids": [1], "response_ids": [2]}])),
        (RunDirError, "damaged-file", lambda: session.load(tmp_path)),
    ]:
        with raises(error, code) as raised:
            call()
        messages.append(str(raised.value).replace(str(tmp_path), "FOLDER"))
    wording("\n".join(messages))


def test_a_state_of_another_model_is_refused(tmp_path, llama_folder):
    shutil.copytree(llama_folder, tmp_path / "model")
    folder = {"model": {"name_or_path": str(tmp_path / "model")}, "lora": {"rank": 2}}
    Session(folder).save(tmp_path / "state")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with raises(RunDirError, "mismatch", "state: "):
        Session(folder).load(tmp_path / "state")


def test_the_examples(tmp_path, monkeypatch, capsys):
    """The supervised loop lowers the loss, and the RL loop trains its model."""
    shutil.copytree(ROOT / "example", tmp_path / "example")
    monkeypatch.chdir(tmp_path)
    session = runpy.run_path("example/session_sft.py")["main"](10)
    assert session.step == 10 and "'loss': " in capsys.readouterr().out
    means = runpy.run_path("example/session_rl.py")["main"](2)
    assert len(means) == 2 and Path("runs/session-rl/state/manifest.json").exists()
