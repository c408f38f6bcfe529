"""Weights of turns, and documents that share a beginning, on two ranks: the training of one process."""

import pytest

from tests.chats import THINKING, conversations, written
from tests.distributed.launch import launch
from tests.distributed.test_fsdp import figures, same_training

SETTINGS = {
    "sft": (),
    "packed": ("packing=true", "gradient_accumulation_steps=2"),
    "dft": ("loss.name=dft", "packing=true"),
    "kd": ("loss.name=kd", "loss.teacher=tiny", "packing=true"),
}


def test_two_ranks_train_as_one_process(job, scratch, tmp_path):
    """The sum of the losses is divided by the sum of the weights of both ranks, in evaluations, too."""
    rows = written(tmp_path / "chats.jsonl", conversations(24, weights=(0, 0.5, 1, 2)))
    (tmp_path / "thinking.jinja").write_text(THINKING)
    options = (f"datasets=[{rows}]", f"chat_template={tmp_path / 'thinking.jinja'}", "validation_split=5")
    options += ("train_on=each_turn", "eval_batch_size=2")
    alone = {name: job(name, *options, *more) for name, more in SETTINGS.items()}
    ranked = {name: job(f"ranks-{name}", *options, *more, fsdp="full") for name, more in SETTINGS.items()}
    launch(0, list(alone.values()), scratch / "alone")
    launch(2, list(ranked.values()), scratch / "ranks")
    for name, wanted in alone.items():
        same_training(ranked[name], wanted)
        ours, theirs = (figures(each, "eval")[-1] for each in (ranked[name], wanted))
        for key in ("loss", "perplexity", "avg_p_correct"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key
