"""Check the options of rollouts."""

from dataclasses import fields

from minitrain.config.issues import ConfigIssues
from minitrain.config.schema import Config
from minitrain.config.sections import RolloutConfig
from minitrain.losses import Loss

from .engine import check_engine
from .environments import build_environment
from .prompts import check_rows
from .rewards import build_rewards

DEFAULTS = RolloutConfig()


def check(config: Config, loss: Loss, issues: ConfigIssues) -> None:
    """Add the problems of the section `rollout` to `issues`, and give the loss its sampling temperature.

    Args:
        config: The full config.
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
    if loss.head_labels is not None:
        message = (
            f"conflicts with loss.name={name}, whose model returns scores, not text. Use another loss, or remove it."
        )
        issues.add("rollout.num_generations", "conflict", message, "loss.name")
        return
    _check_loss(config, loss, issues)
    _check_sizes(config, loss, issues)
    for key, reason in _unused(options, loss).items():
        if key in changed:
            issues.add(f"rollout.{key}", "no-effect", f"has no effect: {reason}")
    check_engine(options, config.soft_prompt.num_virtual_tokens, issues)
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
    compares = loss.example_type == "preference" or getattr(loss.options, "advantage_estimator", "") in ("grpo", "rloo")
    if options.num_generations == 1 and compares:
        message = "must be at least 2, because the answers to a prompt are compared, got 1. Set 8."
        issues.add("rollout.num_generations", "conflict", message, "loss.name")
    if getattr(loss.options, "advantage_estimator", "") == "given":
        message = "sampled answers have no given advantages. Use grpo, rloo, reinforce++ or gae."
        issues.add("loss.advantage_estimator", "conflict", message)
    if loss.example_type == "rollout" and (options.top_p < 1 or options.top_k):
        key = "top_p" if options.top_p < 1 else "top_k"
        message = "conflicts with a loss of probability ratios, which are those of the full distribution. Remove it."
        issues.add(f"rollout.{key}", "conflict", message, "loss.name")
    if getattr(loss.options, "reference", "") == "precomputed":
        message = "conflicts with rollout.num_generations: sampled answers are not known before training. Use auto."
        issues.add("loss.reference", "conflict", message)
    if hasattr(loss.options, "temperature"):
        if config.loss.get("temperature", options.temperature) != options.temperature:
            message = f"must be rollout.temperature={options.temperature:g}. Remove it."
            issues.add("loss.temperature", "conflict", message)
        config.loss["temperature"] = loss.options.temperature = options.temperature
    if getattr(loss.options, "loss_aggregation", "") == "dr_grpo" and loss.options.max_new_tokens is None:
        config.loss["max_new_tokens"] = loss.options.max_new_tokens = options.max_new_tokens
    if loss.example_type == "unpaired_preference" and options.prompts_per_round == 1:
        message = f"must be at least 2 with {name}, which compares answers to different prompts, got 1."
        issues.add("rollout.prompts_per_round", "conflict", message, "loss.name")


def _check_sizes(config: Config, loss: Loss, issues: ConfigIssues) -> None:
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


def _unused(options: RolloutConfig, loss: Loss) -> dict[str, str]:
    """Return the options that have no effect, each with the reason."""
    unused = {}
    if options.zero_variance_groups != "resample":
        unused["max_draws"] = "it needs rollout.zero_variance_groups=resample."
    if options.environment is None:
        unused["max_turns"] = "it needs rollout.environment."
    if loss.example_type != "rollout":
        unused["importance_correction"] = "it needs loss.name=policy."
        if loss.example_type != "preference":
            unused["zero_variance_groups"] = "it needs a loss that compares the answers to a prompt."
    if options.importance_correction == "none":
        unused["correction_high"] = "it needs rollout.importance_correction."
    if options.importance_correction != "icepop":
        unused["correction_low"] = "it needs rollout.importance_correction=icepop."
    if loss.example_type != "conversation" or "teacher" in loss.requires:
        unused["min_reward"] = "it needs loss.name=sft or dft."
    if not options.rewards:
        unused["reward_timeout"] = "it needs rollout.rewards."
    return unused
