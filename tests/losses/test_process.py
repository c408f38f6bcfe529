"""The loss process against PyTorch, where its scores are read, and a run from the data to `minitrain score`."""

import json

import pytest
import torch
import torch.nn.functional as F

from minitrain import ConfigError, create_loss
from minitrain.batch import PolicyOutput
from minitrain.cli.main import main
from minitrain.config.sections import DatasetConfig
from minitrain.data.encode import TruncationConfig, encode
from minitrain.data.examples import to_example
from minitrain.data.template import Template
from minitrain.losses import Models
from minitrain.model.tiny import tiny_tokenizer
from tests.conftest import metrics
from tests.examples import N, collated, policy_for, prepared
from tests.messages import raises

pytestmark = pytest.mark.numeric
ROW = {"prompt": "count from 1", "steps": ["2", "three is 3", "5"], "labels": [True, None, 0]}


class Scored:
    """A policy that gives the targets these scores."""

    def __init__(self, scores: torch.Tensor | None):
        self.scores = scores

    def __call__(self, batch, at_targets: bool) -> PolicyOutput:
        assert at_targets
        return PolicyOutput(None, batch.target_docs, batch.n_docs, values=self.scores)


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_loss_is_binary_cross_entropy(weight):
    """Of each step; right ones have a weight. The unit is the step."""
    loss = create_loss("process", positive_weight=weight)
    batch = collated(prepared(loss), [[i] for i in range(N)])
    scores = torch.randn(batch.n_targets, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = batch.target_feature("step_label").double()
    wanted = -(weight * labels * F.logsigmoid(scores) + (1 - labels) * F.logsigmoid(-scores)).sum().item()
    output = loss(batch, Models(Scored(scores.requires_grad_())))
    assert output.loss_sum.item() == pytest.approx(wanted, rel=1e-6) and output.num_items == batch.n_targets
    assert torch.autograd.gradcheck(lambda x: loss(batch, Models(Scored(x))).loss_sum, (scores,), atol=1e-4)
    found = {name: (total / n).item() for name, (total, n) in output.metrics.items()}
    rewards = scores.detach().sigmoid()
    assert found["reward/right"] == pytest.approx(rewards[labels == 1].mean().item())
    assert found["reward/wrong"] == pytest.approx(rewards[labels == 0].mean().item())
    assert found["accuracy"] == pytest.approx(((rewards > 0.5) == (labels == 1)).double().mean().item())


def tokens_of(row: dict, limits: TruncationConfig):
    template = Template(tiny_tokenizer(), "chatml")
    return encode(to_example(row, DatasetConfig("x"), "solution"), template, limits), template


@pytest.mark.parametrize("key", ["steps", "completions"])
def test_the_marks_are_the_last_tokens_of_the_steps(key):
    """Each step is followed by its separator, whose last token has the label; one without a label is no target."""
    row = {"prompt": ROW["prompt"], key: ROW["steps"], "labels": ROW["labels"]}
    ((tokens,), template) = tokens_of(row, TruncationConfig(200))
    text = template.tokenizer.decode(tokens.ids)
    assert text.endswith("assistant\n2\nthree is 3\n5\n")
    marks = [i for i, is_target in enumerate(tokens.mask) if is_target]
    assert [template.tokenizer.decode(tokens.ids[: i + 1]).splitlines()[-1] for i in marks] == ["2", "5"]
    assert [tokens.token_features["step_label"][i] for i in marks] == [1.0, 0.0]
    row["step_separator"] = " so "
    ((tokens,), template) = tokens_of(row, TruncationConfig(200))
    assert template.tokenizer.decode(tokens.ids).endswith("2 so three is 3 so 5 so ")


def test_truncation():
    """Of the prompt, of the end, which may take marks away, or of all."""
    ((whole,), _) = tokens_of(ROW, TruncationConfig(200))
    n = len(whole.ids)
    ((shorter,), _) = tokens_of(ROW, TruncationConfig(n - 3))
    assert shorter.ids[-10:] == whole.ids[-10:] and sum(shorter.mask) == 2 and shorter.counts == {"truncated": 1}
    ((ended,), _) = tokens_of(ROW, TruncationConfig(n - 1, "end"))
    assert ended.ids == whole.ids[:-1] and sum(ended.mask) == 1
    assert isinstance(tokens_of(ROW, TruncationConfig(n - 1, "drop"))[0], str)
    first = whole.mask.index(True)
    assert isinstance(tokens_of(ROW, TruncationConfig(first, "end"))[0], str)


def test_the_scores_are_those_of_the_head_at_the_marks():
    """As transformers computes them for the text up to there."""
    loss = create_loss("process")
    policy = policy_for(loss)
    batch = collated(prepared(loss), [[2], [4]])
    values = policy(batch, at_targets=True).values
    position = batch.target_positions[3].item()
    row, column = divmod(position, batch.input_ids.shape[1])
    logits = policy.model(input_ids=batch.input_ids[row : row + 1, : column + 1]).logits  # its last token
    torch.testing.assert_close(values[3], logits[0, 0], rtol=1e-4, atol=1e-5)


def test_an_encoder_is_refused():
    loss = create_loss("process")
    with raises(ConfigError, "conflict", "loss.name: ", "process"):
        loss(collated(prepared(loss), [[0]]), Models(Scored(None)))


def test_a_run(make_trainer, tmp_path, capsys):
    """It learns which steps are right, and `score` gives a probability for each step of rows without labels."""
    steps = {"right": "aa", "wrong": "bb"}
    rows = [
        {
            "prompt": f"say {i}",
            "steps": [steps["right"], steps["wrong" if i % 2 else "right"]],
            "labels": [1, 1 - i % 2],
        }
        for i in range(24)
    ]
    file = tmp_path / "steps.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = make_trainer(f"datasets=[{file}]", "loss.name=process", "n_steps=20", "lr=1e-2", "validation_split=4")
    ended = trainer.train()
    assert ended["accuracy"] == 1 and ended["reward/right"] > 0.7 > 0.4 > ended["reward/wrong"]
    assert metrics(trainer)[-1]["loss"] < 0.5 * metrics(trainer)[0]["loss"]
    del rows[0]["labels"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    capsys.readouterr()
    assert main(["score", str(trainer.run.final), "--input", str(file), "--output", str(tmp_path / "out.jsonl")]) == 0
    found = [json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").open()]
    assert [[probability > 0.5 for probability in row] for row in found] == [[True, True], [True, False]]


def test_options_that_have_no_effect(make_trainer, tmp_path):
    file = tmp_path / "steps.jsonl"
    file.write_text(json.dumps(ROW) + "\n")
    with raises(ConfigError, "no-effect", "train_on: "):
        make_trainer(f"datasets=[{file}]", "loss.name=process", "train_on=last_turn")
