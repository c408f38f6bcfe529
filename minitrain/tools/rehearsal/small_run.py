"""Make the config of a rehearsal from that of a run: small, on a CPU, in a temporary folder."""

import dataclasses
from pathlib import Path
from typing import Any

from minitrain.config.issues import ConfigIssues, ConfigSource
from minitrain.config.schema import Config, option_fields
from minitrain.config.sections import LoRAConfig, RolloutConfig, SoftPromptConfig
from minitrain.inference.generate import model_config
from minitrain.inference.resolve import find_model
from minitrain.losses import create_loss
from minitrain.model.adapter_config import read_config
from minitrain.model.load import trained_outputs
from minitrain.model.shrink import MIN_WIDTH, shrink_model
from minitrain.rl.rewards import build_rewards
from minitrain.training.aux_models import teacher_config

from .on_cpu import Untried

N_STEPS = 3
# So that answers of random weights end after different numbers of tokens, and their rewards differ a little.
STOPS, LENGTH_REWARD = list("eqzXJ07%(;\n"), {"name": "length", "weight": 1e-3}


def small_config(config: Config, folder: Path, n_ranks: int, shard: str) -> tuple[Config, str, Untried]:
    """Return the config of a rehearsal, its model in words, and what it does not try.

    Args:
        config: The checked config, of `parse_for_cpu`.
        folder: A temporary folder for the small models and the run.
        n_ranks: The number of ranks.
        shard: `fsdp.shard` of the run.
    """
    small, untried = _small_model(config, folder)
    untried |= _small_others(small, config, folder) | _small_data(small, n_ranks)
    if config.trainer == "FSDPTrainer":
        small.fsdp = dataclasses.replace(small.fsdp, shard=shard, timeout_seconds=min(60, small.fsdp.timeout_seconds))
    trackers = [f.name for f in option_fields(Config) if getattr(getattr(small, f.name), "enabled", False)]
    for name in trackers:
        setattr(small, name, dataclasses.replace(getattr(small, name), enabled=False))
    if trackers:
        untried["trackers"] = f"{', '.join(trackers)}, which get nothing"
    if small.resume not in ("auto", "never"):
        untried["resume"] = f"{small.resume}, whose model is larger"
    if small.loss.get("reference") == "precomputed":  # of small models, which the cache of the user need not keep
        small.cache_dir = str(folder / "cache")
    small.output_dir, small.resume, small.allow_changes, small.max_minutes = str(folder / "runs"), "auto", [], None
    return small, untried.pop("model"), untried


def _small_model(config: Config, folder: Path) -> tuple[Config, Untried]:
    """Return the config with a small model, and its size in words as the topic `model`."""
    small, model = dataclasses.replace(config), config.model
    if model.name_or_path == "tiny":
        return small, {"model": "tiny, with random weights"}
    head = "none" if create_loss(**config.loss).head_labels is not None else None
    size = shrink_model(model, folder / "model", max(MIN_WIDTH, config.lora.rank), head)
    untried = {"model": size, "weights": f"those of {model.name_or_path}, which take no part in this"}
    if model.adapter:
        saved = read_config(Path(model.adapter))
        if saved["peft_type"] == "LORA":
            small.lora = LoRAConfig(rank=min(saved["r"], MIN_WIDTH))
        else:
            method = "prefix" if saved["peft_type"] == "PREFIX_TUNING" else "prompt"
            small.soft_prompt = SoftPromptConfig(num_virtual_tokens=4, method=method)
        untried["adapter"] = f"{model.adapter}, which fits the large model only; a new one instead"
    if any(entry != "embeddings" for entry in config.freeze_layers):
        small.freeze_layers = [0, *(entry for entry in config.freeze_layers if entry == "embeddings")]
    if config.lora.layers_to_transform:
        small.lora = dataclasses.replace(config.lora, layers_to_transform=[0])
    tokenizer = model.tokenizer_name_or_path
    path = str(folder / "model")
    small.model = dataclasses.replace(model, name_or_path=path, revision=None, archive=None, adapter=None)
    small.model.tokenizer_name_or_path = tokenizer
    return small, untried


def _small_others(small: Config, config: Config, folder: Path) -> Untried:
    """Replace the teacher and the models among the rewards by small ones, and the rewards by ones that differ."""
    untried: Untried = {}
    loss, options = create_loss(**config.loss), config.rollout
    teacher = config.loss.get("teacher")
    if teacher not in (None, "tiny"):
        shrink_model(teacher_config(loss, config), folder / "teacher")
        small.loss = config.loss | {"teacher": str(folder / "teacher")}
        untried["teacher"] = f"{teacher}; a small one with random weights instead"
    if not options.num_generations:
        return untried
    entries: list[Any] = []
    for number, reward in enumerate(build_rewards(options.rewards, ConfigIssues(ConfigSource("rollout")))):
        entry = options.rewards[number]
        name = getattr(reward.options, "name_or_path", "tiny")
        if reward.function.is_model and name != "tiny":
            source = model_config(find_model(name), config.model.trust_remote_code)
            scores = trained_outputs(source) is not None
            shrink_model(source, folder / f"reward-{number}", head="scores" if scores else None)
            entry = entry | {"name_or_path": str(folder / f"reward-{number}")}
            untried[f"reward {reward.key}"] = f"{name}; a small model with random weights instead"
        entries.append(entry)
    if entries:
        entries.append(LENGTH_REWARD)
        untried["rewards"] = "right answers, which random weights do not give; a small reward for the length is added"
    if options.engine != "local":
        untried["engine"] = f"{options.engine}; the model in training samples instead"
    changes = {"rewards": entries, "stop": [*options.stop, *STOPS], "min_reward": None, "engine_args": {}}
    changes |= {"engine": "local", "zero_variance_groups": "keep", "max_draws": RolloutConfig().max_draws}
    for key, limit in {"num_generations": 4, "max_new_tokens": 16, "max_turns": 3, "eval_generations": 2}.items():
        changes[key] = min(limit, getattr(options, key))
    small.rollout = dataclasses.replace(options, **changes)
    return untried


def _small_data(small: Config, n_ranks: int) -> Untried:
    """Shorten the training, its steps and its evaluations."""
    before = f"{small.n_steps:,} steps" if small.n_steps else f"{small.n_epochs:g} epoch{'s' * (small.n_epochs != 1)}"
    accumulated, full = min(2, small.gradient_accumulation_steps), small.total_batch_size
    ratio = min(2, max(1, small.rollout.prompts_per_round // full))
    small.gradient_accumulation_steps = accumulated
    small.total_batch_size = accumulated * n_ranks * (2 if accumulated * n_ranks * 2 <= full else 1)
    if small.rollout.num_generations:
        small.rollout.prompts_per_round = max(2, ratio * small.total_batch_size)
    small.n_steps, small.n_epochs, small.warmup_steps = N_STEPS, 1.0, min(1, small.warmup_steps)
    small.save_every_steps, small.log_every_steps, small.quiet = 1, 1, False
    small.save_models_every_steps = min(2, small.save_models_every_steps)
    if small.eval_datasets or small.validation_split:
        small.eval_every_steps = min(2, small.eval_every_steps)
        small.n_eval_examples = min(8, small.n_eval_examples or 8)
        if small.eval_generate.n_examples:
            limits = {"n_examples": min(2, small.eval_generate.n_examples)}
            limits["max_new_tokens"] = min(8, small.eval_generate.max_new_tokens)
            small.eval_generate = dataclasses.replace(small.eval_generate, **limits)
        if small.early_stopping.patience:
            small.early_stopping = dataclasses.replace(small.early_stopping, patience=100)
    return {
        "length": f"{before} of {full:,} examples; {N_STEPS} of {small.total_batch_size} instead, and evaluations of 8"
    }
