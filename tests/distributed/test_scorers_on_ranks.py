"""Classifiers under FSDP are those of one process: encoders and causal models, whole or adapted."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.distributed.launch import launch
from tests.distributed.test_fsdp import figures, same_training
from tests.scorers import random_base

# The gradient of a key's bias is 0 but for rounding, which Adam would make a step of.
SGD = ("optimizer=SGD", "optimizer_args={momentum: 0.9}")
SETTINGS = {
    "bert": ("validation_split=9", "eval_batch_size=2", "loss.label_smoothing=0.1"),
    "llama": ("validation_split=9", "packing=true", "gradient_accumulation_steps=2", 'loss.class_weights={"no": 3}'),
    "roberta": ("lora.rank=4", "lora.target_modules=[query,value]", "activation_checkpointing=true"),
    "qwen2": ("soft_prompt.num_virtual_tokens=4", "validation_split=9"),
}


def test_two_ranks_train_as_one_process(job, scratch, tmp_path):
    """Gradients, losses, figures of the evaluation, which rank correlations and f1 see whole, and the saved model."""
    rows = [
        {"text": f"{word} {i}", "text_pair": "ab" * (i % 5), "label": word} for i in range(14) for word in ("yes", "no")
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = []
    for kind, options in SETTINGS.items():
        named = (f"datasets=[{data}]", f"model.name_or_path={random_base(kind, tmp_path / kind)}")
        settings = (*named, "loss.name=classify", "max_length=96", *SGD, *options)
        both.append((job(f"alone-{kind}", *settings), job(f"ranks-{kind}", *settings, fsdp="full")))
    launch(0, [alone for alone, _ in both], scratch / "alone")
    launch(2, [ranked for _, ranked in both], scratch / "ranks")
    for alone, ranked in both:
        same_training(ranked, alone, rtol=1e-4)
        for mine, theirs in zip(figures(ranked, "eval"), figures(alone, "eval"), strict=True):
            for key in ("loss", "accuracy", "f1", "precision", "recall", "matthews"):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-4)
    for kind in ("bert", "llama"):
        saved = [
            AutoModelForSequenceClassification.from_pretrained(
                tmp_path / "runs" / f"{run}-{kind}" / "final"
            ).state_dict()
            for run in ("alone", "ranks")
        ]
        for name, tensor in saved[0].items():
            torch.testing.assert_close(saved[1][name], tensor, rtol=1e-4, atol=5e-4)
