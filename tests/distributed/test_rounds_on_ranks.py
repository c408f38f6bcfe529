"""Sampled rounds on two ranks: the rollouts and the training of one process."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minitrain.tools.analysis.compare import read_ledger
from tests.distributed.launch import launch

SETTINGS = {
    "grpo": ("packing=true",),
    "iterations": ("rollout.num_iterations=2", "total_batch_size=2", "n_steps=8"),
    "lora": ("lora.rank=4", "lora.init=gaussian", "loss.kl_coef=0.1"),
    "resample": ("rollout.zero_variance_groups=resample", "rollout.rewards=[{name: regex, pattern: '.*[a-f].*'}]"),
}
ROLLOUT = "rollout={num_generations: 3, prompts_per_round: 4, max_new_tokens: 5, rewards: [length], save_samples: -1}"


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "say " + "x" * i}) + "\n" for i in range(10)))
    return path


def rollouts(job):
    folder = Path(job["config"]["output_dir"]) / job["config"]["exp_name"] / "rollouts"
    return [json.loads(line) for file in sorted(folder.iterdir()) for line in file.read_text().splitlines()]


def test_two_ranks_sample_and_train_as_one_process(job, scratch, prompts):
    """The same answers to the same prompts, each rank its own groups, and the same gradients."""
    options = (f"datasets=[{prompts}]", "loss.name=policy", "total_batch_size=4", ROLLOUT)
    alone = {name: job(name, *options, *more) for name, more in SETTINGS.items()}
    ranked = {name: job(f"ranks-{name}", *options, *more, fsdp="full") for name, more in SETTINGS.items()}
    launch(0, list(alone.values()), scratch / "alone")
    launch(2, list(ranked.values()), scratch / "ranks")
    for name, wanted in alone.items():
        ours, theirs = rollouts(ranked[name]), rollouts(wanted)
        assert [one["messages"] for one in ours] == [one["messages"] for one in theirs], name
        assert [one["reward"] for one in ours] == pytest.approx([one["reward"] for one in theirs]), name
        # The loss of a round is 0 up to rounding, so gradients and weights are compared.
        for file in ("gradients", "ended"):
            found, expected = load_file(ranked[name][file]), load_file(wanted[file])
            for key in expected:
                torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=5e-4, msg=f"{name} {file} {key}")
        ledgers = [
            read_ledger(Path(one["config"]["output_dir"]) / one["config"]["exp_name"]) for one in (ranked[name], wanted)
        ]
        assert [line.tokens for line in ledgers[0].values()] == [line.tokens for line in ledgers[1].values()], name
