"""Check the options of rollouts."""

import math
from collections.abc import Mapping
from dataclasses import fields

from minitrain.config.issues import ConfigIssues
from minitrain.config.schema import Config
from minitrain.config.sections import RolloutConfig
from minitrain.losses import Loss
from minitrain.losses.advantages import GROUPED
from minitrain.losses.policy import SOFT, PolicyOptions

from .engine import check_engine
from .environments import build_environment
from .prompts import check_rows
from .rewards import build_rewards

DEFAULTS = RolloutConfig()
UNUSED_OUTSIDE = {  # options of other sections
    "mask_truncated": "Set rollout.truncated=mask.",
    "truncation": "Remove it: prompts that are too long are left out.",
    "train_on": "Remove it: all of them are trained on.",
    "train_on_reasoning": "Remove it: all of their tokens are trained on.",
    "eval_batch_size": "Set rollout.num_slots.",
}
RATIO_OPTIONS = [  # without effect on the gradient where a ratio is 1, and a value that of the policy that sampled
    *("clip_eps_low", "clip_eps_high", "dual_clip", "eps_value"),
    *(f.name for f in fields(PolicyOptions) if f.name.startswith(SOFT)),
]


def check(config: Config, given: set[str], loss: Loss, issues: ConfigIssues) -> None:
    """Add the problems of the section `rollout` to `issues`, and give the loss its sampling temperature.

    Args:
        config: The full config.
        given: Names of the options that are set explicitly or differ from their default.
        loss: The loss.
        issues: Receives the problems.
    """
    options = config.rollout
    changed = {f.name for f in fields(RolloutConfig) if getattr(options, f.name) != getattr(DEFAULTS, f.name)}
    if not options.num_generations:
        for name in sorted(changed):
            message = "has no effect without rollout.num_generations. Set it, for example to 8, or remove this option."
            issues.add(f"rollout.{name}", "no-effect", message)
        return
    name = config.loss["name"]
    if not loss.writes_text:
        message = (
            f"conflicts with loss.name={name}, whose model returns scores, not text. Use another loss, or remove it."
        )
        issues.add("rollout.num_generations", "conflict", message, "loss.name")
        return
    _check_loss(config, loss, issues)
    _check_loss_options(config, loss, issues)
    _check_sampling(config, issues)
    for key in RATIO_OPTIONS if loss.example_type == "rollout" and is_one_step(config) else ():
        if key in config.loss and (key, loss.options.loss_aggregation) != ("clip_eps_high", "cispo"):
            message = "has no effect: a round is one step, so every ratio is 1. Set rollout.num_iterations=2, or raise "
            message += "rollout.prompts_per_round above total_batch_size."
            issues.add(f"loss.{key}", "no-effect", message, "rollout.num_iterations", "total_batch_size")
    for key, reason in _unused(config, loss).items():
        if key in changed:
            issues.add(f"rollout.{key}", "no-effect", f"has no effect: {reason}")
    for key, reason in UNUSED_OUTSIDE.items():
        if key in given:
            issues.add(key, "no-effect", f"has no effect on sampled answers. {reason}", "rollout.num_generations")
    check_engine(config, issues)
    rewards = build_rewards(options.rewards, issues)
    build_environment(options.environment, issues)
    if not issues:
        check_rows(rewards, config.datasets, issues)


def _check_loss(config: Config, loss: Loss, issues: ConfigIssues) -> None:
    options, name = config.rollout, config.loss["name"]
    is_distillation = "teacher" in loss.requires
    if not options.rewards and options.environment is None and not is_distillation:
        message = "is empty, but the answers need rewards. Name a function, such as exact_match."
        issues.add("rollout.rewards", "missing-option", message)
    compares = loss.example_type == "preference" or getattr(loss.options, "advantage_estimator", "") in GROUPED
    if options.num_generations == 1 and compares:
        message = "must be at least 2, because the answers to a prompt are compared, got 1. Set 8."
        issues.add("rollout.num_generations", "conflict", message, "loss.name")
    if loss.example_type == "rollout" and (options.top_p < 1 or options.top_k):
        key = "top_p" if options.top_p < 1 else "top_k"
        message = "conflicts with a loss of probability ratios, which are those of the full distribution. Remove it."
        issues.add(f"rollout.{key}", "conflict", message, "loss.name")
    if loss.example_type == "unpaired_preference" and options.prompts_per_round == 1:
        message = f"must be at least 2 with {name}, which compares answers to different prompts, got 1."
        issues.add("rollout.prompts_per_round", "conflict", message, "loss.name")


def _check_loss_options(config: Config, loss: Loss, issues: ConfigIssues) -> None:
    """Check the options of the loss, and set those that follow from `rollout`."""
    options = config.rollout
    if getattr(loss.options, "advantage_estimator", "") == "given":
        message = "sampled answers have no given advantages. Use grpo, rloo, reinforce++ or gae."
        issues.add("loss.advantage_estimator", "conflict", message)
    if getattr(loss.options, "advantage_estimator", "") == "gae" and "values" not in loss.requires:
        message = "gae needs the values of sampled answers from a value head. Set it, for example to 0.1."
        issues.add("loss.vf_coef", "missing-option", message, "loss.advantage_estimator")
    if getattr(loss.options, "reference", "") == "precomputed":
        message = "conflicts with rollout.num_generations: sampled answers are not known before training. Use auto."
        issues.add("loss.reference", "conflict", message)
    if getattr(loss.options, "teacher_outputs", None) is not None:
        message = "conflicts with rollout.num_generations: sampled answers are not known before training. Set "
        issues.add("loss.teacher_outputs", "conflict", message + "loss.teacher.")
    if hasattr(loss.options, "temperature"):
        temperature = config.loss.get("temperature", options.temperature)
        if loss.example_type == "rollout" and temperature != options.temperature:
            message = f"must be rollout.temperature={options.temperature:g}. Remove it."
            issues.add("loss.temperature", "conflict", message)
        config.loss["temperature"] = loss.options.temperature = temperature
    if getattr(loss.options, "loss_aggregation", "") == "dr_grpo" and loss.options.max_new_tokens is None:
        config.loss["max_new_tokens"] = loss.options.max_new_tokens = options.max_new_tokens


def _check_sampling(config: Config, issues: ConfigIssues) -> None:
    """Check the sizes of a round and how its answers are sampled."""
    options = config.rollout
    if options.prompts_per_round % config.total_batch_size:
        message = (
            f"must be a multiple of total_batch_size={config.total_batch_size}, which counts prompts, got "
            f"{options.prompts_per_round}. Change one."
        )
        issues.add("rollout.prompts_per_round", "mismatch", message, "total_batch_size")
    if options.max_new_tokens >= config.max_length:
        message = f"leaves no space for a prompt in max_length={config.max_length}. Raise max_length."
        issues.add("rollout.max_new_tokens", "too-large", message, "max_length")
    if options.eval_generations > 1 and options.eval_temperature == 0:
        message = "conflicts with rollout.eval_temperature=0: greedy answers to a prompt are equal. Change one."
        issues.add("rollout.eval_generations", "conflict", message, "rollout.eval_temperature")
    name = options.environment.get("name") if isinstance(options.environment, Mapping) else options.environment
    if name == "tools" and options.max_turns == 1:
        message = "must be at least 2 with tools, which reply to an answer, got 1. Raise it."
        issues.add("rollout.max_turns", "conflict", message, "rollout.environment")


def is_one_step(config: Config) -> bool:
    """Return whether a round is one optimizer step, so that every ratio to the policy that sampled is 1."""
    return config.rollout.num_iterations == 1 and config.rollout.prompts_per_round <= config.total_batch_size


def count_steps(config: Config, n_prompts: int) -> int:
    """Return the number of optimizer steps of a run on rounds of `n_prompts` prompts."""
    options = config.rollout
    n_rounds = math.ceil(config.n_epochs * n_prompts / options.prompts_per_round)
    steps_per_pass = math.ceil(options.prompts_per_round / config.total_batch_size)
    return config.n_steps or max(1, n_rounds * options.num_iterations * steps_per_pass)


def _unused(config: Config, loss: Loss) -> dict[str, str]:
    """Return the options that have no effect, each with the reason."""
    options, unused = config.rollout, {}
    if not config.eval_datasets and not config.validation_split:
        unused |= dict.fromkeys(("eval_generations", "eval_temperature"), "it needs eval_datasets or validation_split.")
    if options.zero_variance_groups != "resample":
        unused["max_draws"] = "it needs rollout.zero_variance_groups=resample."
    if options.environment is None:
        unused["max_turns"] = "it needs rollout.environment."
    if loss.example_type != "rollout":
        unused["importance_correction"] = "it needs loss.name=policy."
        if loss.example_type != "preference":
            unused["zero_variance_groups"] = "it needs a loss that compares the answers to a prompt."
    if options.importance_correction == "none":
        unused |= dict.fromkeys(("correction_high", "correction_level"), "it needs rollout.importance_correction.")
    if options.importance_correction != "icepop":
        unused["correction_low"] = "it needs rollout.importance_correction=icepop."
    if loss.example_type != "conversation" or "teacher" in loss.requires:
        unused["min_reward"] = "it needs loss.name=sft or dft."
    if not options.rewards:
        unused["reward_timeout"] = "it needs rollout.rewards."
        if options.environment is None and options.truncated == "zero":
            unused["truncated"] = "answers have no reward without rollout.rewards. Set mask, or remove it."
    return unused
