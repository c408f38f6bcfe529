"""Options of rollouts that conflict, have no effect, or are missing."""

import pytest

from minitrain import ConfigError, load_config
from minitrain.rl import environments, rewards
from minitrain.rl.environments import register_environment
from minitrain.rl.rewards import NoOptions, register_reward
from tests.messages import raises

ROLLOUT = {"num_generations": 4, "rewards": ["length"]}
QUANTIZED = {"model": {"name_or_path": "tiny", "quantization": "4bit"}, "lora": {"rank": 2}}
KTO = {"loss": {"name": "kto"}}
CASES = [
    ({"num_generations": 0}, {}, "no-effect", "rollout.rewards"),
    ({"rewards": []}, {}, "missing-option", "rollout.rewards"),
    ({"num_generations": 1}, {}, "conflict", "rollout.num_generations"),
    (
        {"num_generations": 1},
        {"loss": {"name": "policy", "advantage_estimator": "reinforce++-baseline"}},
        "conflict",
        "rollout.num_generations",
    ),
    ({"num_generations": 1}, {"loss": {"name": "dpo"}}, "conflict", "rollout.num_generations"),
    ({}, {"loss": {"name": "pairwise"}}, "conflict", "rollout.num_generations"),
    ({}, {"loss": {"name": "value"}}, "conflict", "rollout.num_generations"),
    ({}, {"loss": {"name": "policy", "advantage_estimator": "given"}}, "conflict", "loss.advantage_estimator"),
    ({}, {"loss": {"name": "policy", "temperature": 0.5}}, "conflict", "loss.temperature"),
    ({}, {"loss": {"name": "dpo", "reference": "precomputed"}}, "conflict", "loss.reference"),
    ({}, {"loss": {"name": "policy", "advantage_estimator": "gae"}}, "missing-option", "loss.vf_coef"),
    ({}, {"loss": {"name": "policy", "kl_coef": 0.1, "kl_estimator": "k1"}}, "conflict", "loss.kl_estimator"),
    ({}, {"loss": {"name": "policy", "kl_coef": 0.1, "reference": "precomputed"}}, "conflict", "loss.reference"),
    ({}, {"loss": {"name": "kd", "teacher_outputs": __file__}}, "conflict", "loss.teacher_outputs"),
    ({}, {"loss": {"name": "policy", "clip_eps_low": 0.1}}, "no-effect", "loss.clip_eps_low"),
    ({}, {"loss": {"name": "policy", "clip_eps_high": 0.1}}, "no-effect", "loss.clip_eps_high"),
    ({}, {"loss": {"name": "policy", "dual_clip": 3.0}}, "no-effect", "loss.dual_clip"),
    ({}, {"loss": {"name": "policy", "vf_coef": 0.1, "eps_value": 0.1}}, "no-effect", "loss.eps_value"),
    (
        {},
        {"loss": {"name": "policy", "loss_aggregation": "sapo", "sapo_temperature_neg": 2.0}},
        "no-effect",
        "loss.sapo_temperature_neg",
    ),
    (
        {},
        {"loss": {"name": "policy", "loss_aggregation": "vespo", "vespo_k_pos": 1.0}},
        "no-effect",
        "loss.vespo_k_pos",
    ),
    ({}, {"mask_truncated": True}, "no-effect", "mask_truncated"),
    ({}, {"truncation": "end"}, "no-effect", "truncation"),
    ({}, {"train_on": "last_turn"}, "no-effect", "train_on"),
    ({}, {"train_on_reasoning": False}, "no-effect", "train_on_reasoning"),
    ({}, {"eval_batch_size": 8, "validation_split": 2}, "no-effect", "eval_batch_size"),
    ({"eval_generations": 4}, {}, "no-effect", "rollout.eval_generations"),
    ({"eval_temperature": 0.5}, {}, "no-effect", "rollout.eval_temperature"),
    (
        {"eval_generations": 4, "eval_temperature": 0.0},
        {"validation_split": 2},
        "conflict",
        "rollout.eval_generations",
    ),
    ({"environment": {"name": "tools", "tools": ["calculator"]}}, {}, "conflict", "rollout.max_turns"),
    ({"environment": "tools"}, {}, "conflict", "rollout.max_turns"),
    (
        {"rewards": [], "truncated": "zero"},
        {"loss": {"name": "kd", "teacher": "tiny"}},
        "no-effect",
        "rollout.truncated",
    ),
    ({"top_p": 0.9}, {}, "conflict", "rollout.top_p"),
    ({"top_k": 5}, {}, "conflict", "rollout.top_k"),
    ({"prompts_per_round": 33}, {}, "mismatch", "rollout.prompts_per_round"),
    (
        {"prompts_per_round": 1},
        {"loss": {"name": "kto"}, "total_batch_size": 1},
        "conflict",
        "rollout.prompts_per_round",
    ),
    ({"max_new_tokens": 64}, {"max_length": 64}, "too-large", "rollout.max_new_tokens"),
    (
        {},
        {"validation_split": 0.5, "eval_generate": {"n_examples": 2, "num_generations": 4}},
        "no-effect",
        "eval_generate.num_generations",
    ),
    ({"max_draws": 2}, {}, "no-effect", "rollout.max_draws"),
    ({"max_turns": 2}, {}, "no-effect", "rollout.max_turns"),
    ({"min_reward": 0.5}, {}, "no-effect", "rollout.min_reward"),
    ({"correction_high": 3.0}, {}, "no-effect", "rollout.correction_high"),
    ({"correction_level": "sequence"}, {}, "no-effect", "rollout.correction_level"),
    ({"importance_correction": "tis", "correction_low": 0.2}, {}, "no-effect", "rollout.correction_low"),
    ({"importance_correction": "tis"}, {"loss": {"name": "sft"}}, "no-effect", "rollout.importance_correction"),
    ({"zero_variance_groups": "skip"}, {"loss": {"name": "sft"}}, "no-effect", "rollout.zero_variance_groups"),
    ({"engine_args": {"url": "http://a:8000"}}, {}, "no-effect", "rollout.engine_args"),
    ({"engine": "vllm", "engine_args": {"port": 8000}}, {}, "unknown-option", "rollout.engine_args.port"),
    ({"engine": "vllm", "engine_args": {"url": "a:8000"}}, {}, "invalid-value", "rollout.engine_args.url"),
    ({"engine": "vllm", "engine_args": {"weights_dir": "none/x"}}, {}, "not-found", "rollout.engine_args.weights_dir"),
    ({"engine": "vllm"}, {"soft_prompt": {"num_virtual_tokens": 2}}, "conflict", "rollout.engine"),
    ({"engine": "vllm", "sampler_dtype": "float32"}, {}, "no-effect", "rollout.sampler_dtype"),
    ({"sampler_dtype": "float32"}, {"soft_prompt": {"num_virtual_tokens": 2}}, "conflict", "rollout.sampler_dtype"),
    ({"sampler_dtype": "bfloat16"}, QUANTIZED, "conflict", "rollout.sampler_dtype"),
    ({"environment": "tool"}, {}, "not-a-choice", "rollout.environment"),
    ({"environment": 3}, {}, "wrong-type", "rollout.environment"),
    ({"max_turns": 2, "environment": {"name": "tools", "tool": 1}}, {}, "unknown-option", "rollout.environment.tool"),
    (
        {"max_turns": 2, "environment": {"name": "tools", "tools": ["calculater"]}},
        {},
        "not-a-choice",
        "rollout.environment.tools",
    ),
    (
        {"max_turns": 2, "environment": {"name": "tools", "pattern": "("}},
        {},
        "invalid-value",
        "rollout.environment.pattern",
    ),
    ({"rewards": [{"name": "regex", "pattern": "("}]}, {}, "invalid-value", "rollout.rewards[0].pattern"),
    ({"rewards": [{"name": "regex"}]}, {}, "missing-option", "rollout.rewards[0].pattern"),
]


@pytest.mark.parametrize(("rollout", "options", "code", "key"), CASES)
def test_what_is_refused(rollout, options, code, key, rows_file):
    base = {"model": {"name_or_path": "tiny"}, "datasets": [str(rows_file)], "loss": {"name": "policy"}}
    with raises(ConfigError, code, key):
        load_config(base | options | {"rollout": ROLLOUT | rollout})


def test_the_temperature_of_sampling_is_that_of_the_loss(rows_file):
    """A distillation may have another one: there it softens both distributions."""
    base = {"model": {"name_or_path": "tiny"}, "datasets": [str(rows_file)], "rollout": ROLLOUT | {"temperature": 0.7}}
    assert load_config(base | {"loss": {"name": "policy"}}).loss["temperature"] == 0.7
    distillation = {"name": "kd", "teacher": "tiny"}
    assert load_config(base | {"loss": distillation}).loss["temperature"] == 0.7
    assert load_config(base | {"loss": distillation | {"temperature": 2.0}}).loss["temperature"] == 2.0


@pytest.mark.parametrize("key", ["top_p", "top_k"])
def test_truncated_distributions_are_for_losses_without_ratios(rows_file, key):
    """Ratios are those of the full softmax, from which such answers were not sampled (silent RL bug R2)."""
    base = {"model": {"name_or_path": "tiny"}, "datasets": [str(rows_file)]}
    rollout = {"rollout": ROLLOUT | {key: {"top_p": 0.9, "top_k": 5}[key]}}
    with raises(ConfigError, "conflict", f"rollout.{key}"):
        load_config(base | {"loss": {"name": "policy"}} | rollout)
    for loss in ("sft", "dpo", "kto"):
        load_config(base | {"loss": {"name": loss}} | rollout)


def test_what_is_known_to_have_an_effect_only_online(rows_file):
    """A KL in the rewards needs the reference; more than one step in a round has ratios."""
    base = {"model": {"name_or_path": "tiny"}, "datasets": [str(rows_file)], "total_batch_size": 16}
    in_reward = {"name": "policy", "kl_coef": 0.1, "kl_in": "reward", "reference": "model"}
    clipped = {"name": "policy", "clip_eps_low": 0.1, "dual_clip": 3.0}
    for loss in (in_reward, clipped):
        load_config(base | {"loss": loss, "rollout": ROLLOUT | {"prompts_per_round": 32}})
    load_config(base | {"loss": clipped, "rollout": ROLLOUT | {"prompts_per_round": 16, "num_iterations": 2}})
    below_1 = {"name": "policy", "loss_aggregation": "cispo", "clip_eps_high": 0.5}
    load_config(base | {"loss": below_1, "rollout": ROLLOUT | {"prompts_per_round": 16}})
    with raises(ConfigError, "no-effect", "loss.reference"):
        load_config(base | {"loss": in_reward})


@pytest.mark.parametrize("rewards", ["length", {"name": "length", "target": 3}], ids=["a name", "a mapping"])
def test_one_reward_needs_no_list(rewards, rows_file):
    base = {"model": {"name_or_path": "tiny"}, "datasets": [str(rows_file)], "loss": {"name": "policy"}}
    assert load_config(base | {"rollout": {"num_generations": 4, "rewards": rewards}}).rollout.rewards == [rewards]


def test_a_limit_of_prompts_is_for_sampled_answers_too(rows_file):
    base = {"model": {"name_or_path": "tiny"}, "datasets": [str(rows_file)], "loss": {"name": "policy"}}
    assert load_config(base | {"rollout": ROLLOUT, "max_prompt_length": 9}).max_prompt_length == 9


def test_two_functions_of_one_name_are_refused(monkeypatch):
    monkeypatch.setattr(rewards, "_REGISTRY", dict(rewards._REGISTRY))
    monkeypatch.setattr(environments, "_REGISTRY", dict(environments._REGISTRY))
    with pytest.raises(ConfigError) as error:
        register_reward("length")(lambda answer, options: 0.0)
    assert error.value.code == "already-exists"
    with pytest.raises(ConfigError) as error:
        register_environment("tools", NoOptions)(type("Other", (), {}))
    assert error.value.code == "already-exists"
