"""Every option of `rollout` changes something that can be observed: the rounds, an evaluation, files, or a time."""

import json
import time
from dataclasses import fields
from typing import Any, NamedTuple

import pytest

from minitrain import Trainer
from minitrain.config.sections import RolloutConfig
from minitrain.rl import environments, rewards
from minitrain.rl.documents import tensors_of
from minitrain.rl.environments import Reply, register_environment
from minitrain.rl.rewards import NoOptions, register_reward
from tests.conftest import metrics

BASE = {
    "num_generations": 4,
    "prompts_per_round": 4,
    "max_new_tokens": 6,
    "rewards": ["parity"],
}
ELSEWHERE = {"engine", "engine_args", "sampler_dtype", "correction_level"}  # tests of the engines, and of the losses


class Key(NamedTuple):
    """What an option is changed to.

    Attributes:
        value: Its other value.
        changes: What then differs.
        given: Other options of `rollout` that it needs.
        loss: The loss.
    """

    value: Any
    changes: str = "round"
    given: dict | None = None
    loss: str = "policy"


KEYS = {
    "num_generations": Key(3),
    "prompts_per_round": Key(2),
    "num_iterations": Key(2, "rounds"),
    "max_new_tokens": Key(5),
    "max_turns": Key(3, given={"max_turns": 2, "environment": "polite", "stop": [chr(i) for i in range(128)]}),
    "temperature": Key(0.5),
    "top_p": Key(0.5, loss="dpo"),
    "top_k": Key(2, loss="dpo"),
    "stop": Key([chr(i) for i in range(128)]),
    "rewards": Key(["length"]),
    "environment": Key("polite", given={"max_turns": 2, "environment": "silent", "stop": [chr(i) for i in range(128)]}),
    "zero_variance_groups": Key("resample", given={"rewards": ["first"]}),
    "max_draws": Key(2, "metrics", given={"zero_variance_groups": "resample", "rewards": ["first"], "max_draws": 3}),
    "truncated": Key("zero"),
    "importance_correction": Key("tis"),
    "correction_low": Key(1.0, "round", given={"importance_correction": "icepop", "correction_low": 0.9}),
    "correction_high": Key(1.0, "round", given={"importance_correction": "tis", "correction_high": 2.0}),
    "min_reward": Key(0.5, loss="sft", given={"rewards": ["first"]}),
    "eval_generations": Key(2, "evaluation"),
    "eval_temperature": Key(0.0, "evaluation"),
    "num_slots": Key(3, "slots"),
    "reward_timeout": Key(0.05, "metrics", given={"rewards": ["slow"], "reward_timeout": 5.0}),
    "save_samples": Key(3, "samples"),
}


@pytest.fixture(autouse=True)
def functions(monkeypatch):
    monkeypatch.setattr(rewards, "_REGISTRY", dict(rewards._REGISTRY))
    monkeypatch.setattr(environments, "_REGISTRY", dict(environments._REGISTRY))
    register_reward("first")(lambda answer, options: float(answer.group < 2 and sum(answer.ids) % 2))
    register_reward("parity")(lambda one, options: {"reward": float(sum(one.ids) % 2), "sum": sum(one.ids)})
    register_reward("slow")(lambda answer, options: time.sleep(0.3 * (answer.group == 0)) or float(len(answer.ids) % 2))
    register_environment("polite", NoOptions)(Polite)
    register_environment("silent", NoOptions)(type("Silent", (Polite,), {"reply": lambda self, response: Reply([])}))


class Polite:
    reward = 0.0

    def __init__(self, options):
        pass

    def begin(self, row, messages, seed):
        return messages

    def reply(self, response):
        return Reply([{"role": "user", "content": "ok"}], self.reward)


def observe(tmp_path, name: str, loss: str, rollout: dict) -> dict[str, Any]:
    """Return what can be observed of a run of one step."""
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {i}", "answer": str(i)}) + "\n" for i in range(12)))
    trainer = Trainer(
        {
            "model": {"name_or_path": "tiny", "policy_dtype": "bfloat16"},  # so that corrections differ from 1
            "datasets": [str(rows)],
            "validation_split": 2,
            "output_dir": str(tmp_path / "runs"),
            "exp_name": name,
            "quiet": True,
            "loss": {"name": loss},
            "total_batch_size": 2,
            "n_steps": 3,
            "save_every_steps": 0,
            "rollout": BASE | rollout,
        }
    )
    trainer.train()
    rounds = metrics(trainer, "rollout")
    cache = trainer.train_loader.examples.caches
    samples = (trainer.run.path / "rollouts" / "round-1.jsonl").read_text().splitlines()
    return {
        "round": {name: tensor.tolist() for name, tensor in tensors_of(cache[0]).items()} if cache else {},
        "evaluation": {name: value for name, value in trainer.eval_metrics.items() if name != "seconds"},
        "metrics": {name: value for name, value in rounds[0].items() if "second" not in name and name != "time"},
        "rounds": len(rounds),
        "samples": len(samples),
        "slots": trainer.train_loader.engine.sampler.n_slots,
    }


def test_every_option_has_an_entry():
    names = {field.name for field in fields(RolloutConfig)}
    assert names - ELSEWHERE == KEYS.keys()


@pytest.mark.parametrize("name", KEYS)
def test_no_option_is_dead(name, tmp_path):
    key = KEYS[name]
    before = observe(tmp_path, "before", key.loss, key.given or {})
    after = observe(tmp_path, "after", key.loss, (key.given or {}) | {name: key.value})
    assert before[key.changes] != after[key.changes]
    again = observe(tmp_path, "again", key.loss, key.given or {})
    assert again[key.changes] == before[key.changes]
