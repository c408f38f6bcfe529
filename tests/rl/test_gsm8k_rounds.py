"""A small pretrained model, after SFT on GSM8K, and a reward for the format of its answers."""

import json

import pytest

from minitrain import Trainer
from tests.conftest import SHARED

GSM8K = {"path": str(SHARED / "data" / "gsm8k" / "train.jsonl"), "prompt_template": "{question}\n"}
BASE = {"datasets": [GSM8K], "chat_template": "none", "packing": True}
SFT = {"max_length": 256, "truncation": "drop", "total_batch_size": 32, "n_epochs": 3, "lr": 3e-3, "warmup_ratio": 0.1}
FORMAT = {"name": "regex", "pattern": r".*#### -?[\d,.]+"}
RL = {
    "loss": {"name": "policy"},
    "rollout": {"num_generations": 8, "prompts_per_round": 16, "max_new_tokens": 128, "rewards": [FORMAT]},
    "max_length": 320,
    "total_batch_size": 16,
    "n_steps": 25,
    "warmup_steps": 5,
    "lr": 1e-3,
    "lr_scheduler": "constant",
}


@pytest.mark.slow(minutes=8)
@pytest.mark.skipif(not SHARED.exists(), reason="real models are not here")
def test_the_format_reward_rises_on_gsm8k(tmp_path):
    """From 0.73 in the first round to about 0.98 in the last ten: almost every answer ends in `#### NUMBER`."""
    folder = {"output_dir": str(tmp_path)}
    model = {"name_or_path": str(SHARED / "models" / "stories260K")}
    Trainer(BASE | SFT | folder | {"exp_name": "sft", "model": model, "lr_scheduler": "cosine"}).train()
    model = {"name_or_path": str(tmp_path / "sft" / "final")}
    Trainer(BASE | RL | folder | {"exp_name": "rl", "model": model}).train()
    lines = map(json.loads, (tmp_path / "rl" / "metrics.jsonl").read_text().splitlines())
    rewards = [line["reward"] for line in lines if line["kind"] == "rollout"]
    assert rewards[0] < 0.8 and sum(rewards[-10:]) / 10 > 0.9
