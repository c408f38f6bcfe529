"""Check the options of a run: its directory, optimizer and evaluation, and whether data and models fit the loss."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from minitrain.config.issues import ConfigIssues, format_value, keys_overlap
from minitrain.config.python_objects import find_object, is_lost
from minitrain.config.schedules import SCHEDULES, argument_problems
from minitrain.config.schema import Config, all_keys
from minitrain.config.suggest import hint_for_value, suggest
from minitrain.data.examples import OF_TEXTS, ROW_FORMATS
from minitrain.distributed.checks import uneven_batch
from minitrain.distributed.process import world_size
from minitrain.errors import ConfigError
from minitrain.io.paths import near_file
from minitrain.io.system import RESERVED
from minitrain.model.checks import check_folder

if TYPE_CHECKING:
    from minitrain.losses import Loss

WHOLE_MATRIX_OPTIMIZERS = ("Adafactor", "LAMB", "LARS")  # beginnings of names
NEEDS_EVAL_DATA = ("eval_every_steps", "n_eval_examples", "eval_batch_size", "save_best")
DRIFT = ("eval_kl_to_start", "retention_datasets")


def check(config: Config, given: set[str], issues: ConfigIssues) -> None:
    """Check the options of a run that can be checked without torch.

    Args:
        config: The full config.
        given: Names of the options that are set explicitly or differ from their default.
        issues: Receives the problems.
    """
    _check_run(config, issues)
    _check_steps(config, issues)
    _check_evaluation(config, given, issues)


def check_loss_fits(config: Config, given: set[str], loss: "Loss", issues: ConfigIssues) -> None:
    """Check that the options of data, teacher and evaluation fit the loss."""
    name = config.loss["name"]
    from .aux_models import reference_kind

    if (
        "reference" in loss.requires
        and reference_kind(loss, config) == "model"
        and find_object(config.model.name_or_path)
    ):
        message = "needs a second copy of a model given in Python. Set loss.reference=precomputed, or lora.rank."
        issues.add("loss.reference", "conflict", message)
    _check_teacher(config.loss, "teacher" in loss.requires, issues)
    for key in ("chat_template", "chat_template_kwargs", "train_on", "max_prompt_length"):
        if key in given and (loss.example_type in OF_TEXTS or (key, loss.example_type) == ("train_on", "solution")):
            reason = "trains on all steps with a label" if loss.example_type == "solution" else "uses no chat template"
            message = f"has no effect with {name}, which {reason}. Remove it."
            issues.add(key, "no-effect", message, "loss.name")
    if loss.example_type != "rollout" and config.mask_truncated:
        message = f"has no effect with {name}, which does not train on rollouts. Remove it."
        issues.add("mask_truncated", "no-effect", message, "loss.name")
    has_reward_kl = getattr(loss.options, "kl_in", "") == "reward" and loss.options.kl_coef > 0
    if has_reward_kl and not loss.online and "reference" in config.loss:
        message = "has no effect: the KL in the rewards is computed from old_logps and ref_logps of the rows."
        issues.add("loss.reference", "no-effect", message, "loss.kl_in")
    for key in ("truncation", "max_prompt_length"):
        if loss.example_type == "rollout" and not loss.online and key in given:
            message = "has no effect on rollouts, which are not truncated. Remove it, or set mask_truncated."
            issues.add(key, "no-effect", message, "loss.name")
    for i, entry in enumerate(config.datasets):
        if entry.type in ROW_FORMATS and ROW_FORMATS[entry.type].kind != loss.data_kind:
            kind = ROW_FORMATS[entry.type].kind
            message = f"{name} trains on {loss.data_kind} rows, got {entry.type}, a format of {kind} rows."
            issues.add(f"datasets[{i}].type", "mismatch", f"{message} Change one.", "loss.name")
    if loss.example_type in ("unpaired_preference", "rollout") and config.eval_generate.n_examples and not loss.online:
        message = f"{loss.example_type} rows have no correct responses to compare with. Remove it."
        issues.add("eval_generate", "conflict", message, "loss.name")
    _check_drift(config, given, loss, issues)
    if loss.head_labels is not None and config.model.router_aux_loss_coef:
        message = f"has no effect with {name}, whose model has no LM head. Remove it."
        issues.add("model.router_aux_loss_coef", "no-effect", message, "loss.name")
    if loss.online and config.eval_generate.num_generations > 1:
        message = "has no effect on answers that are sampled in training. Set rollout.eval_generations instead."
        issues.add("eval_generate.num_generations", "no-effect", message, "rollout")
    if not loss.writes_text and config.eval_generate.n_examples:
        message = f"conflicts with {name}, whose model returns scores, not text. Remove it."
        issues.add("eval_generate", "conflict", message, "loss.name")


def _check_drift(config: Config, given: set[str], loss: "Loss", issues: ConfigIssues) -> None:
    """Check the options of what evaluations compute besides the loss."""
    from minitrain.model.adapter_config import has_adapter

    name = config.loss["name"]
    for key in DRIFT:
        if not loss.writes_text and key in given:
            message = f"conflicts with {name}, whose model returns scores, not text. Remove it."
            issues.add(key, "conflict", message, "loss.name")
    for i, entry in enumerate(config.retention_datasets):
        if entry.type in ROW_FORMATS and ROW_FORMATS[entry.type].kind != "conversation":
            message = f"expected a format of conversations or text, got {entry.type}. Change it."
            issues.add(f"retention_datasets[{i}].type", "mismatch", message)
    if not config.eval_kl_to_start:
        return
    if loss.online and not config.retention_datasets:
        message = "has no effect on answers that are sampled. Set retention_datasets, or remove it."
        issues.add("eval_kl_to_start", "no-effect", message, "rollout", "retention_datasets")
    if find_object(config.model.name_or_path) and not has_adapter(config):
        message = "needs a second copy of a model given in Python. Set lora.rank, or remove it."
        issues.add("eval_kl_to_start", "conflict", message)


def _check_run(config: Config, issues: ConfigIssues) -> None:
    from importlib.util import find_spec

    if config.exp_name in (".", "..") or re.search(RESERVED, config.exp_name):
        message = f"expected the name of a folder, got {config.exp_name!r}. Set output_dir for the parent folder."
        issues.add("exp_name", "invalid-value", message)
    if config.resume not in ("auto", "never") and not Path(config.resume).is_dir():
        message = f"expected auto, never or the folder of a checkpoint, got {config.resume!r}. Correct it."
        issues.add("resume", "not-found", message)
    for key in config.allow_changes:
        if not any(keys_overlap(key, known) for known in all_keys()):
            advice = suggest(key, all_keys()) or " Remove it."
            issues.add("allow_changes", "unknown-option", f"unknown option {key!r}.{advice}")
    if config.keep_models and not config.save_models_every_steps:
        message = "has no effect without save_models_every_steps. Set it, or remove keep_models."
        issues.add("keep_models", "no-effect", message, "save_models_every_steps")
    if config.report_to_tensorboard and find_spec("tensorboard") is None:
        message = "package tensorboard is not installed. Run pip install tensorboard."
        issues.add("report_to_tensorboard", "not-installed", message)
    for name in ("wandb", "swanlab", "trackio", "mlflow"):
        if getattr(config, name).enabled and find_spec(name) is None:
            message = f"package {name} is not installed. Run pip install {name}."
            issues.add(f"{name}.enabled", "not-installed", message)


def _check_teacher(options: dict, needed: bool, issues: ConfigIssues) -> None:
    """Check the teacher among the given options of a loss."""
    name, outputs = options.get("teacher"), options.get("teacher_outputs")
    if name is not None:
        check_folder("loss.teacher", name, "Merge it into its base model first: minitrain merge {}", issues)
    elif needed:
        message = "is missing. Set it to a folder or a Hub model, or set loss.teacher_outputs."
        issues.add("loss.teacher", "missing-option", message)
    if outputs is not None and Path(outputs).is_dir():
        message = f"{outputs} is a folder. Name the file that `minitrain cache-teacher` wrote."
        issues.add("loss.teacher_outputs", "wrong-path", message)
    elif outputs is not None and not Path(outputs).is_file():
        message = f"file {outputs} does not exist (relative to {Path.cwd()}). Run `minitrain cache-teacher`."
        issues.add("loss.teacher_outputs", "not-found", message + near_file(Path(outputs)))


def _check_steps(config: Config, issues: ConfigIssues) -> None:
    if config.activation_offload and config.activation_checkpointing == "none":
        message = "has no effect without activation_checkpointing. Set activation_checkpointing=full, or remove it."
        issues.add("activation_offload", "no-effect", message, "activation_checkpointing")
    if config.deterministic and config.optimizer_in_backward:
        message = "computes the first step twice, but optimizer_in_backward then updates twice. Set only one of them."
        issues.add("deterministic", "conflict", message, "optimizer_in_backward")
    if uneven := uneven_batch(config, world_size(), "processes"):
        issues.add("total_batch_size", "conflict", uneven)
    if config.n_steps is not None and config.warmup_steps > config.n_steps:
        message = f"expected at most n_steps={config.n_steps}, got {config.warmup_steps}. Lower it."
        issues.add("warmup_steps", "out-of-range", message)
    if config.lr_decay_ratio is not None and not SCHEDULES[config.lr_scheduler].decays:
        decaying = " or ".join(name for name, one in SCHEDULES.items() if one.decays)
        message = f"has no effect without lr_scheduler={decaying}. Remove it."
        issues.add("lr_decay_ratio", "no-effect", message, "lr_scheduler")
    if config.lr_decay_ratio is not None and config.lr_scheduler_args.get("num_decay_steps") is not None:
        message = "conflicts with lr_scheduler_args.num_decay_steps, the same in steps. Remove one."
        issues.add("lr_decay_ratio", "conflict", message, "lr_scheduler_args")


def check_schedule_arguments(config: Config, issues: ConfigIssues) -> None:
    """Check the arguments of the schedule of a config with a learning rate."""
    for argument, code, message in argument_problems(config.lr_scheduler, config.lr_scheduler_args, config.lr):
        key = f"lr_scheduler_args.{argument}".removesuffix(".")
        issues.add(key, code, message, "lr_scheduler", *(["lr"] if code == "out-of-range" else []))


def check_optimizer_options(config: Config, given: set[str], issues: ConfigIssues) -> None:
    """Check the optimizer and its options. Arguments as for `check`."""
    from minitrain.distributed.parallel import pick_device

    from .optim import accepted_options, check_optimizer, optimizer_class

    _check_in_backward(config, given, issues)
    if is_lost(config.optimizer):
        message = f"{config.optimizer} was given in Python. Name a class of torch.optim, or train from Python."
        issues.add("optimizer", "not-found", message)
        return
    if find_object(config.optimizer):
        for key in ("optimizer_args", *(given & {"betas", "eps", "weight_decay"})):
            if key in given:
                issues.add(key, "no-effect", "has no effect with an optimizer from Python. Set it there.", "optimizer")
        return
    if len(config.betas) != 2 or not all(0 <= beta < 1 for beta in config.betas):
        message = f"expected two numbers >= 0 and < 1, got {format_value(config.betas)}. Correct them."
        issues.add("betas", "invalid-value", message)
    try:
        chosen = optimizer_class(config.optimizer)
    except ConfigError as error:
        issues.add("optimizer", error.code, f"{error.message}{hint_for_value('optimizer', config.optimizer)}")
        return
    is_sharded = config.trainer == "FSDPTrainer" and config.fsdp.shard != "none"
    if is_sharded and chosen.__name__.startswith(WHOLE_MATRIX_OPTIMIZERS):
        message = f"{chosen.__name__} needs full matrices, but fsdp.shard={config.fsdp.shard} splits them. Use AdamW."
        issues.add("optimizer", "conflict", message, "fsdp.shard")
    accepted = accepted_options(chosen)
    for key in ("betas", "eps", "weight_decay"):
        if key in given and key not in accepted:
            message = f"has no effect with {chosen.__name__}, which has no {key}. Remove it."
            issues.add(key, "no-effect", message, "optimizer")
    extra = [name for name in accepted if name not in ("params", "lr", "betas", "eps", "weight_decay")]
    if config.optimizer_args.get("bf16_stochastic_round"):
        _check_stochastic_rounding(config, issues)
    for key, value in config.optimizer_args.items():
        if key not in extra:
            message = f"unknown option of {chosen.__name__}. Use one of {', '.join(extra)}."
            issues.add(f"optimizer_args.{key}", "unknown-option", message, "optimizer")
        elif isinstance(value, float) and not math.isfinite(value):
            issues.add(f"optimizer_args.{key}", "not-finite", f"expected a finite number, got {value}. Correct it.")
    try:
        on_cpu = pick_device(config.device).type == "cpu"
    except ConfigError:  # `check_device` reports it
        on_cpu = False
    try:
        check_optimizer(config, on_cpu)
    except ConfigError as error:
        message = error.message.removeprefix("optimizer: ")
        issues.add("optimizer", error.code, message, "optimizer_args", "betas", "eps", "lr", "weight_decay")


def _check_in_backward(config: Config, given: set[str], issues: ConfigIssues) -> None:
    """Check the options that optimizer_in_backward excludes."""
    if not config.optimizer_in_backward:
        return
    key = "optimizer_in_backward"
    if find_object(config.optimizer):
        message = "has no effect with an optimizer from Python, which updates all its parameters at once. Remove it."
        issues.add(key, "no-effect", message, "optimizer")
    if config.max_grad_norm:
        message = "conflicts with max_grad_norm, since the norm is known only after the backward pass. Set it to 0."
        issues.add(key, "conflict", message, "max_grad_norm")
    several = {"gradient_accumulation_steps": config.gradient_accumulation_steps > 1}
    several["max_tokens_per_micro_batch"] = config.max_tokens_per_micro_batch is not None
    for option, is_set in several.items():
        if is_set:
            message = f"conflicts with {option}, since each micro-batch would update. Remove one of them."
            issues.add(key, "conflict", message, option)
    if config.model.policy_dtype == "float16":
        message = "conflicts with float16, whose overflows are known only after the backward pass. Use bfloat16."
        issues.add(key, "conflict", message, "model.policy_dtype")
    if "max_bad_steps" in given:
        message = "has no effect with optimizer_in_backward, which cannot skip a step. Remove it."
        issues.add("max_bad_steps", "no-effect", message, key)


def _check_stochastic_rounding(config: Config, issues: ConfigIssues) -> None:
    key = "optimizer_args.bf16_stochastic_round"
    if config.model.master_dtype != "bfloat16":
        message = "has no effect on float32 parameters. Set model.master_dtype=bfloat16, or remove it."
        issues.add(key, "no-effect", message, "model.master_dtype")
    if config.trainer == "FSDPTrainer" and config.fsdp.shard in ("none", "hybrid"):
        message = f"would round the replicas of fsdp.shard={config.fsdp.shard} differently. Use full or grad."
        issues.add(key, "conflict", message, "fsdp.shard")


def _check_evaluation(config: Config, given: set[str], issues: ConfigIssues) -> None:
    stopping, generation = config.early_stopping, config.eval_generate
    if not config.eval_datasets and not config.validation_split:
        needs_data = "has no effect without evaluation data. Set eval_datasets or validation_split."
        for key in (*NEEDS_EVAL_DATA, *DRIFT, "eval_generate", "early_stopping"):
            if key in given:
                issues.add(key, "no-effect", needs_data, "eval_datasets", "validation_split")
    if not generation.n_examples and "eval_generate" in given:
        message = "has no effect without eval_generate.n_examples. Set it, for example to 20."
        issues.add("eval_generate", "no-effect", message, "eval_generate.n_examples")
    if generation.match not in ("text", "number") and not _has_one_group(generation.match):
        message = f"expected text, number or a regular expression with one (group), got {generation.match!r}."
        advice = suggest(generation.match, ("text", "number")) or " Correct it."
        issues.add("eval_generate.match", "invalid-value", message + advice)
    if generation.num_generations == 1 and generation.temperature != 1.0:
        message = "has no effect without eval_generate.num_generations. Set it, for example to 8."
        issues.add("eval_generate.temperature", "no-effect", message, "eval_generate.num_generations")
    if config.n_eval_examples and generation.n_examples > config.n_eval_examples:
        message = f"expected at most n_eval_examples={config.n_eval_examples}, got {generation.n_examples}. Lower it."
        issues.add("eval_generate.n_examples", "out-of-range", message)
    if "early_stopping" in given and not stopping.patience and not config.save_best:
        message = "has no effect without early_stopping.patience or save_best. Set one of them."
        issues.add("early_stopping", "no-effect", message, "early_stopping.patience", "save_best")
    if stopping.patience and not config.eval_every_steps:
        message = "has no effect without eval_every_steps. Set it."
        issues.add("early_stopping.patience", "no-effect", message, "eval_every_steps")
    if stopping.metric == "exact_match" and not generation.n_examples:
        message = "exact_match needs generated responses. Set eval_generate.n_examples."
        issues.add("early_stopping.metric", "conflict", message, "eval_generate")


def _has_one_group(expression: str) -> bool:
    try:
        return re.compile(expression).groups == 1
    except re.error:
        return False
