"""The examples that sample their answers learn what their headers say."""

import shutil

import pytest

from minitrain import Trainer, load_config
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the examples, and runs/half, which the examples start from.

    After a number of steps, its exact match depends on how a processor rounds, so it ends once half is learned.
    """

    def stop_at_half(trainer):
        trainer.should_stop = trainer.eval_metrics["exact_match"] >= 0.45

    folder = tmp_path_factory.mktemp("online")
    shutil.copytree(ROOT / "example", folder / "example")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = ["n_steps=600", "exp_name=half", "eval_every_steps=20"]
        Trainer(load_config("example/quickstart-sft.yml", options), on_eval_end=stop_at_half).train()
    return folder


@pytest.mark.parametrize(
    "name, least",
    [
        pytest.param("rl-sums", 0.08, marks=pytest.mark.slow(minutes=5)),
        pytest.param("rl-ppo", 0.08, marks=pytest.mark.slow(minutes=4)),
        pytest.param("rl-dpo", 0.06, marks=pytest.mark.slow(minutes=2)),
        pytest.param("rl-rejection", 0.06, marks=pytest.mark.slow(minutes=2)),
        pytest.param("rl-distill", 0.1, marks=pytest.mark.slow(minutes=4)),
    ],
)
def test_an_example_answers_more_questions(name, least, folder, monkeypatch):
    """Greedy exact match on unseen questions rises, by at least half of what the header says."""
    monkeypatch.chdir(folder)
    if name == "rl-distill":
        Trainer(load_config("example/quickstart-sft.yml")).train()
    accuracies = []
    config = load_config(f"example/{name}.yml")
    Trainer(config, on_eval_end=lambda t: accuracies.append(t.eval_metrics["reward/exact_match"])).train()
    assert accuracies[-1] - accuracies[0] >= least
