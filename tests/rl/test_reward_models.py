"""Rewards of frozen models, and rewards of single tokens."""

import json

import pytest
import torch
from transformers import LlamaForCausalLM

from minitrain import ConfigError
from minitrain.data.examples import Conversation, user
from minitrain.inference.score import ScoringRequest, load_scorer
from minitrain.model.save import save_model
from minitrain.model.tiny import tiny_scorer, tiny_tokenizer
from minitrain.rl import environments
from minitrain.rl import rewards as registry
from minitrain.rl.rewards import NoOptions, register_reward
from tests.conftest import random_llama
from tests.messages import raises
from tests.rl.test_rounds import online  # noqa: F401 (a fixture)


@pytest.fixture(autouse=True)
def own_rewards(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.fixture
def scorer(tmp_path):
    """Return a function that saves a random model with these classes; one is a reward model."""

    def save(*labels):
        model = tiny_scorer(random_llama(), len(labels), 1)
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: number for number, label in enumerate(labels)}
        save_model(model, tiny_tokenizer(), tmp_path / "scorer", torch.float32)
        return str(tmp_path / "scorer")

    return save


def sampled(trainer):
    """Sample a round, and return its answers as they were saved."""
    trainer.train()
    file = trainer.run.path / "rollouts" / "round-1.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def as_requests(answers):
    return [
        ScoringRequest("here", {}, Conversation([user(one["prompt"][0]["content"]), *one["messages"]]))
        for one in answers
    ]


def rollout(**reward):
    return {"rewards": [reward], "save_samples": -1, "max_new_tokens": 8}


@pytest.mark.parametrize("packing", [True, False])
def test_a_reward_model_gives_the_scores_of_the_command(online, scorer, packing):  # noqa: F811
    """Answers of several lengths, in batches of 3, equal `minitrain score`; an empty answer has a score, too."""
    options = rollout(name="model", name_or_path=scorer("s"), batch_size=3) | {"stop": ["a", "e", "t"]}
    trainer = online(n_steps=1, packing=packing, rollout=options)
    answers = sampled(trainer)
    assert all(abs(one["reward"]) < 100 for one in answers) and len({one["tokens"] for one in answers}) > 1
    assert_scores(answers, trainer.config.rollout.rewards[0]["name_or_path"])


def assert_scores(answers, folder):
    full = [one for one in answers if one["messages"][-1]["content"].strip()]
    requests = as_requests(full)
    scores = load_scorer(folder, requests, "cpu").scores(requests)[:, 0]
    assert [one["reward"] for one in full] == pytest.approx(scores.tolist(), abs=1e-4)


def test_a_run_with_an_adapter_is_a_reward_model(online, tmp_path):  # noqa: F811
    """That of loss.name=pairwise with LoRA; quantized to 4 bits, the scores differ a little."""
    rows = [{"prompt": f"say {i}", "chosen": "a" * i, "rejected": "b"} for i in range(2, 10)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"loss": "pairwise", "datasets": [str(tmp_path / "pairs.jsonl")], "lora": {"rank": 4}, "lr": 0.01}
    online("judge", rollout=False, n_steps=1, **options).train()
    folder = str(tmp_path / "runs" / "judge")
    answers = sampled(online(n_steps=1, rollout=rollout(name="model", name_or_path=folder)))
    assert_scores(answers, folder)
    quantized = rollout(name="model", name_or_path=folder, quantization="4bit")
    others = sampled(online("quantized", n_steps=1, rollout=quantized))
    differences = [abs(one["reward"] - other["reward"]) for one, other in zip(answers, others, strict=True)]
    assert 0 < max(differences) < max(abs(one["reward"]) for one in answers) + 1


def test_a_classifier_gives_the_probability_of_a_class(online, scorer):  # noqa: F811
    folder = scorer("bad", "good")
    trainer = online(n_steps=1, rollout=rollout(name="model", name_or_path=folder, label="good"))
    full = [one for one in sampled(trainer) if one["messages"][-1]["content"].strip()]
    requests = as_requests(full)
    scores = load_scorer(folder, requests, "cpu").scores(requests).softmax(1)[:, 1]
    assert [one["reward"] for one in full] == pytest.approx(scores.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "options", "code"),
    [
        (["a", "b"], {}, "not-a-choice"),
        (["a", "b"], {"label": "c"}, "not-a-choice"),
        (["a"], {"label": "a"}, "not-a-choice"),
        (None, {"name_or_path": "./missing"}, "not-found"),
    ],
)
def test_a_reward_model_that_does_not_fit_is_refused(online, scorer, labels, options, code):  # noqa: F811
    reward = {"name": "model", "name_or_path": scorer(*labels) if labels else None} | options
    with raises(ConfigError, code, "rollout.rewards[0].name_or_path: "):
        online(rollout={"rewards": [reward]})


def test_a_language_model_is_not_a_reward_model(online, llama_folder):  # noqa: F811
    with raises(ConfigError, "unsupported-model", "rollout.rewards[0].name_or_path: "):
        online(rollout={"rewards": [{"name": "model", "name_or_path": str(llama_folder)}]})


def columns(trainer):
    """Return the token features of the sampled tokens of a round."""
    cache = trainer.train_loader.examples.caches[0]
    return {name: values[cache.mask.bool()] for name, values in cache.token_features.items()}


DISTILLATION = {"name": "policy", "advantage_estimator": "reinforce++", "gamma": 0.0, "whiten": False}


def test_a_teacher_rewards_each_token(online, llama_folder):  # noqa: F811
    """log p_T - log p_S, by transformers; with gamma=0 it is the advantage of its token (on-policy distillation)."""
    reward = {"name": "teacher", "name_or_path": str(llama_folder), "batch_size": 3, "weight": 0.5}
    trainer = online(loss=DISTILLATION, n_steps=1, rollout={"rewards": [reward], "temperature": 0.7})
    trainer.train()
    teacher, cache = LlamaForCausalLM.from_pretrained(llama_folder), trainer.train_loader.examples.caches[0]
    expected = []
    for start, stop in zip(cache.offsets, cache.offsets[1:], strict=False):
        ids, mask = cache.ids[start:stop].long(), cache.mask[start:stop].bool()
        with torch.no_grad():
            logps = (teacher(ids[None]).logits[0, :-1] / 0.7).log_softmax(-1)  # [T - 1, V]
        logps = logps.gather(1, ids[1:, None])[:, 0][mask[1:]]
        expected.append(0.5 * (logps - cache.token_features["sample_logps"][start:stop][mask]))
    found = columns(trainer)
    torch.testing.assert_close(found["token_rewards"], torch.cat(expected), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["advantages"], found["token_rewards"])
    sums = torch.tensor([float(part.sum()) for part in expected], dtype=torch.float64)
    torch.testing.assert_close(torch.from_numpy(cache.doc_features["reward"]), sums, rtol=1e-3, atol=1e-3)


def test_a_teacher_that_is_the_policy_rewards_nothing(online):  # noqa: F811
    """Also in an evaluation at another temperature, or of greedy answers."""
    reward = {"name": "teacher", "name_or_path": "tiny"}
    for eval_temperature in (0.0, 0.5):
        rollout = {"rewards": [reward], "eval_temperature": eval_temperature}
        options = {"loss": DISTILLATION, "n_steps": 1, "lr": 1e-30, "validation_split": 2}
        trainer = online(f"run-{eval_temperature}", rollout=rollout, **options)
        trainer.train()
        assert columns(trainer).get("token_rewards", torch.zeros(1)).abs().max() < 1e-4
        assert abs(trainer.evaluate([{"prompt": "say 1"}])["reward"]) < 1e-3


def test_a_teacher_with_another_tokenizer_is_refused(online, llama_folder, tmp_path):  # noqa: F811
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<other>"])
    save_model(random_llama(), tokenizer, tmp_path / "other", torch.float32)
    with raises(ConfigError, "mismatch", "rollout.rewards: teacher: name_or_path: "):
        online(rollout={"rewards": [{"name": "teacher", "name_or_path": str(tmp_path / "other")}]})


@pytest.mark.parametrize("estimator", ["reinforce++", "gae", "grpo", "rloo"])
def test_rewards_of_tokens_reach_the_loss(online, estimator):  # noqa: F811
    """Those of a function, of a number and of an environment's turn: per token, or their sum in grpo and rloo."""
    register_reward("ids")(lambda one, options: [float(token % 5) for token in one.ids])
    rewards = [{"name": "ids", "weight": 2.0}, {"name": "length", "scale": 1}]
    loss = {"name": "policy", "advantage_estimator": estimator, "gamma": 0.0, "whiten": False}
    loss |= {"scale_rewards": False} if estimator == "grpo" else {}
    loss |= {"vf_coef": 0.1} if estimator == "gae" else {}
    if estimator in ("grpo", "rloo"):
        del loss["gamma"]
    trainer = online(loss=loss, n_steps=1, rollout={"rewards": rewards})
    trainer.train()
    cache = trainer.train_loader.examples.caches[0]
    totals = []
    for start, stop in zip(cache.offsets, cache.offsets[1:], strict=False):
        mask = cache.mask[start:stop].bool()
        ids = cache.ids[start:stop][mask]
        own = 2.0 * (ids % 5).double()
        totals.append(float(own.sum()) - len(ids))
        own[-1] -= len(ids)  # what belongs to no token
        if estimator == "reinforce++":
            advantages = cache.token_features["advantages"][start:stop][mask]
            torch.testing.assert_close(advantages.double(), own)
        if estimator == "gae":
            returns = cache.token_features["returns"][start:stop][mask]
            values = cache.token_features["values"][start:stop][mask]
            torch.testing.assert_close(returns.double(), own, rtol=1e-4, atol=1e-4)
            advantages = cache.token_features["advantages"][start:stop][mask]
            torch.testing.assert_close(advantages, returns - values, rtol=1e-4, atol=1e-4)
    assert cache.doc_features["reward"].tolist() == pytest.approx(totals)
    if estimator == "rloo":
        groups = cache.doc_features["group"]
        for number, total in enumerate(totals):
            others = [t for i, t in enumerate(totals) if groups[i] == groups[number] and i != number]
            at = cache.offsets[number + 1] - 1
            advantage = float(cache.token_features["advantages"][at])
            assert advantage == pytest.approx(total - sum(others) / len(others), abs=1e-4)


def test_the_reward_of_a_turn_belongs_to_its_last_token(online, monkeypatch):  # noqa: F811
    """An environment's reward for the first of two turns is not at the end of the conversation.

    Those of a function are at the sampled tokens of both turns.
    """
    register_reward("ids")(lambda one, options: [float(token % 5) for token in one.ids])

    class TwoTurns:
        def __init__(self, options):
            self.turn = 0

        def begin(self, row, messages, seed):
            return messages

        def reply(self, response):
            self.turn += 1
            return environments.Reply([{"role": "user", "content": "again"}] if self.turn == 1 else [], 10.0**self.turn)

    monkeypatch.setitem(environments._REGISTRY, "two-turns", environments.EnvironmentClass(TwoTurns, NoOptions))
    trainer = online(
        loss=DISTILLATION,
        n_steps=1,
        rollout={"rewards": ["ids"], "environment": "two-turns", "max_turns": 2, "stop": ["a", "e", "t", "<"]},
        max_length=256,
    )
    trainer.train()
    cache = trainer.train_loader.examples.caches[0]
    of_two = 0
    for start, stop in zip(cache.offsets, cache.offsets[1:], strict=False):
        mask = cache.mask[start:stop].bool()
        of_ids = (cache.ids[start:stop] % 5).float() * mask
        advantages = (cache.token_features["advantages"][start:stop] - of_ids).tolist()
        ends = [i for i in range(len(mask)) if mask[i] and (i + 1 == len(mask) or not mask[i + 1])]
        if len(ends) == 2:
            of_two += 1
            assert advantages[ends[0]] == 10.0 and advantages[ends[1]] in (0.0, 100.0)
            assert sum(map(abs, advantages)) == advantages[ends[0]] + advantages[ends[1]]
    assert of_two
