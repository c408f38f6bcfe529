"""Silent RL bugs between sampling and training: other weights, distributions, random numbers or modes."""

import pytest
import torch

from minitrain.inference.choice import uniforms_of
from tests.rl.test_rounds import ROLLOUT, online  # noqa: F401 (a fixture)
from tests.rl.test_vllm import ADAPTERS, differences

pytestmark = pytest.mark.numeric
LEAKS = {  # generation_config.json of a model
    "do_sample": True,
    "temperature": 0.1,
    "top_p": 0.3,
    "top_k": 2,
    "min_p": 0.5,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 6,
    "max_length": 4,
    "max_new_tokens": 2,
    "num_beams": 2,
    "suppress_tokens": list(range(50, 250)),
    "begin_suppress_tokens": list(range(3, 50)),
    "bad_words_ids": [[token] for token in range(100, 200)],
    "forced_eos_token_id": 2,
    "sequence_bias": [[[60], 50.0]],
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": [1, 3.0],
}


def sampled_ids(trainer):
    """Return the token ids of the first round."""
    next(trainer.train_loader.steps())
    return trainer.train_loader.examples.caches[0].ids.tolist()


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_log_probabilities_are_those_of_the_sampling_temperature(online, temperature):  # noqa: F811
    """At each token, the policy's log-probability is the sampler's (silent RL bug R1)."""
    trainer = online(rollout={"temperature": temperature, "num_iterations": 2}, n_steps=1)
    trainer.train()
    assert differences(trainer).max() < 1e-5


def test_generation_config_changes_nothing(online):  # noqa: F811
    """No option of generation_config.json reaches the samples (silent RL bug R3)."""
    usual, leaking = online("usual"), online("leaking")
    for name, value in LEAKS.items():
        assert hasattr(leaking.policy.model.generation_config, name), name
        setattr(leaking.policy.model.generation_config, name, value)
    assert sampled_ids(leaking) == sampled_ids(usual)


def test_the_output_layer_of_sampling_is_that_of_training_in_bfloat16(online):  # noqa: F811
    """In bfloat16 on one side alone, logits of about 30 would differ by 0.1 (silent RL bug R6)."""
    model = {"name_or_path": "tiny", "policy_dtype": "bfloat16"}
    trainer = online(rollout={"num_iterations": 2, "temperature": 0.3}, n_steps=1, model=model)
    with torch.no_grad():
        trainer.policy.model.lm_head.weight.add_(0.5)
    trainer.train()
    assert differences(trainer).mean() < 0.02


@pytest.mark.parametrize("name", ADAPTERS)
def test_sampling_is_from_the_weights_after_each_step(online, name):  # noqa: F811
    """After steps with a large learning rate, its log-probabilities are the policy's (silent RL bug R37)."""
    rollout = {"importance_correction": "tis", "num_iterations": 2}  # which needs old_logps
    trainer = online(rollout=rollout, n_steps=5, lr=0.05, lr_scheduler="constant", max_grad_norm=0.0, **ADAPTERS[name])
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    trainer.train()
    assert max((p - q).detach().abs().max() for p, q in zip(before, trainer.parameters, strict=True)) > 0.05
    assert differences(trainer).max() < 1e-5


def test_no_two_answers_share_random_numbers(online):  # noqa: F811
    """Over rounds, prompts, answers, turns and ranks; two ranks use those of one (silent RL bug R38)."""
    rollout = {"max_turns": 2, "environment": {"name": "tools", "tools": ["calculator"], "pattern": "(.)"}}
    rounds = online(rollout=rollout).train_loader
    rounds.trainer.template.end_ids = lambda: list(range(3, 100))
    sample, keys = rounds.engine.sample, []
    rounds.engine.sample = lambda requests, *rest: (
        keys.extend(k for r in requests for k in r.keys) or sample(requests, *rest)
    )

    def keys_of(rank, world_size):
        keys.clear()
        rounds.rank, rounds.world_size = rank, world_size
        for number in (0, 1):
            rounds.n_drawn = 0
            rounds.play(rounds.draw(4), (0, 1, number), 3)
        return list(keys)

    alone, ranks = keys_of(0, 1), [key for rank in (0, 1) for key in keys_of(rank, 2)]
    assert len(alone) > 2 * 4 * 3 and sorted(alone) == sorted(ranks)
    assert len({next(uniforms_of(key)) for key in ranks}) == len(ranks)


def state_of(trainer):
    """Return what a round could leave behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = {
        name: (module.training, *(len(getattr(module, hook)) for hook in hooks), sorted(vars(module)))
        for name, module in trainer.policy.named_modules()
    }
    config = trainer.policy.model.config.to_dict(), trainer.policy.model.generation_config.to_dict()
    gradients = [(p.requires_grad, p.grad is None) for p in trainer.policy.parameters()]
    return modules, config, gradients, torch.is_grad_enabled(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("options", [{}, {"lora": {"rank": 4, "dropout": 0.1}}], ids=["full", "lora"])
def test_a_round_leaves_the_model_as_it_was(online, options):  # noqa: F811
    """Modes, hooks, use_cache, random numbers; sampling without activation checkpointing (silent RL bug R40)."""
    answers = []
    for checkpointing in (False, True):
        trainer = online(f"run-{checkpointing}", activation_checkpointing=checkpointing, **options)
        trainer.policy.train()
        before = state_of(trainer)
        answers.append(sampled_ids(trainer))
        assert state_of(trainer) == before
    assert answers[0] == answers[1] and len(answers[0]) > ROLLOUT["num_generations"] * 4
