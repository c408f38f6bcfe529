"""Check the options of a run: its directory, optimizer, evaluation, and how data and models fit the loss."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from minitrain.config.issues import ConfigIssues, format_value, keys_overlap
from minitrain.config.python_objects import find_object, is_lost
from minitrain.config.schedules import SCHEDULES
from minitrain.config.schema import Config, all_keys
from minitrain.config.suggest import hint_for_value, suggest
from minitrain.data.examples import ROW_FORMATS
from minitrain.distributed.checks import uneven_batch
from minitrain.distributed.process import world_size
from minitrain.errors import ConfigError
from minitrain.io.paths import near_file
from minitrain.model.checks import check_folder

if TYPE_CHECKING:
    from minitrain.losses import Loss

# They do not step on a gradient alone, or take only some shapes of parameters.
UNFIT_OPTIMIZERS = {"Optimizer", "LBFGS", "SparseAdam", "Muon"}
WHOLE_MATRIX_OPTIMIZERS = {"Adafactor"}
NEEDS_EVAL_DATA = ("eval_every_steps", "n_eval_examples", "eval_batch_size", "save_best")


def check(config: Config, given: set[str], issues: ConfigIssues) -> None:
    """Add to `issues` what is wrong with the options of a run that need no torch to check.

    Args:
        given: Names of the options that were written or are not at their default.
    """
    _check_run(config, issues)
    _check_steps(config, issues)
    _check_evaluation(config, given, issues)


def check_loss_fits(config: Config, given: set[str], loss: "Loss", issues: ConfigIssues) -> None:
    """Add to `issues` the options of data, teacher and evaluation that do not fit the loss."""
    name = config.loss["name"]
    from .aux_models import reference_kind

    if (
        "reference" in loss.requires
        and reference_kind(loss, config) == "model"
        and find_object(config.model.name_or_path)
    ):
        message = (
            "needs a second copy of a model that was given in Python. Set loss.reference=precomputed, or lora.rank."
        )
        issues.add("loss.reference", "conflict", message)
    _check_teacher(config.loss, "teacher" in loss.requires, issues)
    for key in ("chat_template", "chat_template_kwargs", "train_on", "max_prompt_length"):
        if loss.example_type == "classification" and key in given:
            issues.add(key, "no-effect", f"would be ignored: {name} reads texts as they are.", "loss.name")
    if loss.example_type != "rollout" and config.mask_truncated:
        issues.add(
            "mask_truncated", "no-effect", f"would be ignored: {name} does not learn from rollouts.", "loss.name"
        )
    for key in ("truncation", "max_prompt_length"):
        if loss.example_type == "rollout" and key in given:
            issues.add(key, "no-effect", "would be ignored: rollouts are never cut. See mask_truncated.", "loss.name")
    for i, entry in enumerate(config.datasets):
        if entry.type in ROW_FORMATS and ROW_FORMATS[entry.type].kind != loss.example_type:
            kind = ROW_FORMATS[entry.type].kind
            told = f"{entry.type} rows are {kind} rows, and {name} learns from {loss.example_type} rows."
            issues.add(f"datasets[{i}].type", "mismatch", told, "loss.name")
    if loss.example_type in ("unpaired_preference", "rollout") and config.eval_generate.n_examples:
        told = f"the answers of {loss.example_type} rows need not be right, so none can be compared with them."
        issues.add("eval_generate", "conflict", told, "loss.name")
    if loss.head_labels is not None and config.eval_generate.n_examples:
        issues.add("eval_generate", "conflict", f"a model that {name} trains gives scores and no text.", "loss.name")


def _check_run(config: Config, issues: ConfigIssues) -> None:
    from importlib.util import find_spec

    if config.exp_name in (".", "..") or re.search(r"[/\\\0]", config.exp_name):
        issues.add(
            "exp_name",
            "invalid-value",
            f"{config.exp_name!r} is not the name of a folder; set output_dir for its place.",
        )
    if config.resume not in ("auto", "never") and not Path(config.resume).is_dir():
        issues.add("resume", "not-found", f"{config.resume!r} is neither auto, never, nor the folder of a checkpoint.")
    for key in config.allow_changes:
        if not any(keys_overlap(key, known) for known in all_keys()):
            issues.add("allow_changes", "unknown-option", f"there is no option {key!r}.{suggest(key, all_keys())}")
    if config.keep_models and not config.save_models_every_steps:
        issues.add(
            "keep_models", "no-effect", "would be ignored: it needs save_models_every_steps.", "save_models_every_steps"
        )
    if config.report_to_tensorboard and find_spec("tensorboard") is None:
        issues.add(
            "report_to_tensorboard",
            "not-installed",
            "the package tensorboard is not installed: pip install tensorboard",
        )
    for name in ("wandb", "swanlab"):
        if getattr(config, name).enabled and find_spec(name) is None:
            issues.add(f"{name}.enabled", "not-installed", f"the package {name} is not installed: pip install {name}")


def _check_teacher(options: dict, needed: bool, issues: ConfigIssues) -> None:
    """`options`: of the loss, those that are given."""
    name, outputs = options.get("teacher"), options.get("teacher_outputs")
    if name is not None:
        check_folder("loss.teacher", name, "Merge it into its base model first: minitrain merge {}", issues)
    elif needed:
        told = "is missing: name the folder or the hub name of a model, or what it says with loss.teacher_outputs."
        issues.add("loss.teacher", "missing-option", told)
    if outputs is not None and Path(outputs).is_dir():
        issues.add(
            "loss.teacher_outputs",
            "wrong-path",
            f"{outputs} is a folder; name the file that `minitrain cache-teacher` made.",
        )
    elif outputs is not None and not Path(outputs).is_file():
        told = f"there is no file {outputs} (seen from {Path.cwd()}); `minitrain cache-teacher` makes one."
        issues.add("loss.teacher_outputs", "not-found", told + near_file(Path(outputs)))


def _check_steps(config: Config, issues: ConfigIssues) -> None:
    if uneven := uneven_batch(config, world_size(), "processes"):
        issues.add("total_batch_size", "conflict", uneven)
    if config.n_steps is not None and config.warmup_steps > config.n_steps:
        issues.add("warmup_steps", "out-of-range", f"{config.warmup_steps} is more than n_steps={config.n_steps}.")
    if config.lr_decay_ratio is not None and not SCHEDULES[config.lr_scheduler].decays:
        decaying = " or ".join(name for name, one in SCHEDULES.items() if one.decays)
        issues.add(
            "lr_decay_ratio", "no-effect", f"would be ignored: it needs lr_scheduler={decaying}.", "lr_scheduler"
        )


def check_optimizer_options(config: Config, given: set[str], issues: ConfigIssues) -> None:
    from .optim import accepted_options, check_optimizer, optimizer_class

    if is_lost(config.optimizer):
        message = f"{config.optimizer} stands for a function that was given in Python. Name a class of torch.optim."
        issues.add("optimizer", "not-found", message)
        return
    if find_object(config.optimizer):
        for key in ("optimizer_args", *(given & {"betas", "eps", "weight_decay"})):
            if key in given:
                issues.add(key, "no-effect", "has no effect with an optimizer from Python; set it there.", "optimizer")
        return
    if len(config.betas) != 2 or not all(0 <= beta < 1 for beta in config.betas):
        told = f"expected two numbers from 0 to below 1, got {format_value(config.betas)}."
        issues.add("betas", "invalid-value", told)
    try:
        chosen = optimizer_class(config.optimizer, UNFIT_OPTIMIZERS)
    except ConfigError as error:
        issues.add("optimizer", error.code, f"{error.message}{hint_for_value('optimizer', config.optimizer)}")
        return
    if config.trainer == "FSDPTrainer" and config.fsdp.shard != "none" and chosen.__name__ in WHOLE_MATRIX_OPTIMIZERS:
        told = f"{chosen.__name__} looks at whole matrices, which fsdp.shard={config.fsdp.shard} cuts up; use AdamW."
        issues.add("optimizer", "conflict", told, "fsdp.shard")
    accepted = accepted_options(chosen)
    for key in ("betas", "eps", "weight_decay"):
        if key in given and key not in accepted:
            issues.add(key, "no-effect", f"would be ignored: {chosen.__name__} has no {key}.", "optimizer")
    own = [name for name in accepted if name not in ("params", "lr", "betas", "eps", "weight_decay")]
    for key, value in config.optimizer_args.items():
        if key not in own:
            issues.add(
                f"optimizer_args.{key}", "unknown-option", f"{chosen.__name__} takes {', '.join(own)}.", "optimizer"
            )
        elif isinstance(value, float) and not math.isfinite(value):
            issues.add(f"optimizer_args.{key}", "not-finite", f"expected a finite number, got {value}.")
    try:
        check_optimizer(config)
    except ConfigError as error:
        told = error.message.removeprefix("optimizer: ")
        issues.add("optimizer", error.code, told, "optimizer_args", "betas", "eps", "lr", "weight_decay")


def _check_evaluation(config: Config, given: set[str], issues: ConfigIssues) -> None:
    stopping, answers = config.early_stopping, config.eval_generate
    if not config.eval_datasets and not config.validation_split:
        needs_data = "would be ignored: there is nothing to evaluate on. Give eval_datasets or validation_split."
        for key in (*NEEDS_EVAL_DATA, "eval_generate", "early_stopping"):
            if key in given:
                issues.add(key, "no-effect", needs_data, "eval_datasets", "validation_split")
    if not answers.n_examples and "eval_generate" in given:
        told = "would be ignored: it needs eval_generate.n_examples, for example 20."
        issues.add("eval_generate", "no-effect", told, "eval_generate.n_examples")
    if answers.match not in ("text", "number") and not _has_one_group(answers.match):
        told = f"{answers.match!r} is neither text, number, nor a regular expression with one group in parentheses."
        issues.add("eval_generate.match", "invalid-value", told + suggest(answers.match, ("text", "number")))
    if config.n_eval_examples and answers.n_examples > config.n_eval_examples:
        issues.add(
            "eval_generate.n_examples", "out-of-range", f"is more than n_eval_examples={config.n_eval_examples}."
        )
    if "early_stopping" in given and not stopping.patience and not config.save_best:
        told = "would be ignored: it needs early_stopping.patience, or save_best=true."
        issues.add("early_stopping", "no-effect", told, "early_stopping.patience", "save_best")
    if stopping.patience and not config.eval_every_steps:
        issues.add(
            "early_stopping.patience", "no-effect", "would be ignored: it needs eval_every_steps.", "eval_every_steps"
        )
    if stopping.metric == "exact_match" and not answers.n_examples:
        issues.add("early_stopping.metric", "conflict", "exact_match needs eval_generate.n_examples.", "eval_generate")


def _has_one_group(expression: str) -> bool:
    try:
        return re.compile(expression).groups == 1
    except re.error:
        return False
