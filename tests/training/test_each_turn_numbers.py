"""train_on=each_turn trains as a row for each answer does, in every layout and for every loss of conversations."""

import json
import re

import pytest
import torch.nn.functional as F

from minitrain.cli.main import main
from minitrain.inference.teacher_cache import cache_teacher_outputs
from tests.chats import THINKING, assert_same, conversations, first_step, separate, written

ROWS = conversations(weights=(0, 0.5, 1, 2))
LAYOUTS = {
    "padded": (),
    "packed": ("packing=true",),
    "micro-batches": ("packing=true", "gradient_accumulation_steps=4"),
    "without shared beginnings": ("packing=true", "model.attn_implementation=eager", "max_length=300"),
    "truncated": ("packing=true", "max_length=100"),
    "dropped": ("packing=true", "max_length=170", "truncation=drop"),
}
LOSSES = {
    "sft": (),
    "focal": ("loss.focal_gamma=2", "loss.label_smoothing=0.1"),
    "dft": ("loss.name=dft",),
    "kd": ("loss.name=kd", "loss.teacher=tiny", "loss.top_k=5"),
}
CASES = [("sft", layout) for layout in LAYOUTS] + [(loss, layout) for loss in LOSSES for layout in ("padded", "packed")]


@pytest.mark.parametrize(("loss", "layout"), dict.fromkeys(CASES))
def test_a_step_is_that_of_separate_rows(turns, tmp_path, loss, layout):
    """Loss and gradients to 1e-6, and all numbers of an evaluation."""
    evaluation = conversations(6, weights=(1, 3))
    limits = [option for option in LAYOUTS[layout] if "max_length" in option or "truncation" in option]
    trainers = []
    for rows, held_out, options in (
        (ROWS, evaluation, ("train_on=each_turn", *LAYOUTS[layout], "eval_batch_size=4")),
        (separate(ROWS), separate(evaluation), ("train_on=last_turn", *limits, "total_batch_size=100")),
    ):
        file = written(tmp_path / "held-out.jsonl", held_out)
        trainers.append(turns(rows, *options, *LOSSES[loss], f"eval_datasets=[{file}]"))
    found, wanted = trainers
    assert any(len(found.train_loader.examples[i]) > 1 for i in range(len(found.train_loader.examples)))
    assert_same(first_step(found), first_step(wanted))
    assert found.evaluate() == pytest.approx(wanted.evaluate(), rel=2e-6)


def test_a_last_turn_has_the_gradient_of_a_plain_loop(turns):
    """Few tokens of a long conversation are targets: fewer than a chunk of the output layer (unsloth#5230)."""
    trainer = turns([row for row in conversations() if len(row["messages"]) > 4], "train_on=last_turn", "packing=true")
    loss, gradients = first_step(trainer)
    model, examples = trainer.policy.model, trainer.train_loader.examples
    model.zero_grad()
    total = n = 0
    for (document,) in map(examples.__getitem__, range(len(examples))):
        ids, mask = document.ids[None].long(), document.mask[1:].bool()
        total = total + F.cross_entropy(model(input_ids=ids).logits[0, :-1][mask], ids[0, 1:][mask], reduction="sum")
        n += int(mask.sum())
    (total / n).backward()
    assert loss == pytest.approx(total.item() / n, rel=1e-5)
    for name, parameter in trainer.policy.named_parameters():
        assert gradients[name].any() and (gradients[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name


def test_outputs_of_a_teacher_that_are_in_a_file(turns, tmp_path):
    """They belong to the tokens of each document, also of those that share a beginning."""
    options = ("train_on=each_turn", "packing=true", "loss.name=kd", "loss.top_k=5", "loss.teacher=tiny")
    live = turns(ROWS, *options)
    options = (*options, f"datasets=[{live.config.datasets[0].path}]")
    file = cache_teacher_outputs(live.config, tmp_path / "teacher.safetensors")
    assert_same(first_step(turns(ROWS, *options, f"loss.teacher_outputs={file}")), first_step(live))


def test_commands_on_documents_of_different_numbers(tmp_path, llama_folder, capsys):
    """inspect names the turns of documents and shows each token once; validate counts and estimates memory."""
    file = written(tmp_path / "rows.jsonl", conversations(6, weights=(0.5, 2)))
    (tmp_path / "thinking.jinja").write_text(THINKING)
    config = {"datasets": [str(file)], "model": {"name_or_path": str(llama_folder)}, "output_dir": str(tmp_path)}
    config |= {
        "chat_template": str(tmp_path / "thinking.jinja"),
        "train_on": "each_turn",
        "batch_size": 6,
        "n_steps": 1,
    }
    (tmp_path / "c.yml").write_text(json.dumps(config))
    for packing, n_tokens in (("true", 1114), ("false", 1534)):
        arguments = [str(tmp_path / "c.yml"), "--overrides", f"packing={packing}"]
        assert main(["inspect", *arguments, "--rows", "3"]) == 0
        out = capsys.readouterr().out
        names = re.findall(r"rows.jsonl:(\d+), (turns? .*) of \d+: tokens", out)
        assert names == [("2", "turn 4"), ("2", "turn 2"), ("6", "turn 4"), ("6", "turn 2"), ("5", "turn 2")]
        assert out.count("after the shared tokens") == (2 if packing == "true" else 0)
        assert ("8 other documents" in out) == (packing == "true") and "target_weights 0.5" in out
        assert main(["validate", *arguments]) == 0
        out = capsys.readouterr().out
        assert f" {n_tokens:,} per step" in out and "peak memory  " in out
