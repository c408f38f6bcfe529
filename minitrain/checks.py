"""What types cannot say: options that contradict each other, would be ignored, or name what is not there."""

import inspect
import os
import re
from pathlib import Path

from .config import Problems, nearest, walk_options
from .errors import ConfigError
from .schema import Config

# They do not step on a gradient alone, or take only some shapes of parameters.
UNFIT_OPTIMIZERS = {"Optimizer", "LBFGS", "SparseAdam", "Muon"}


def check_config(config: Config, given: dict, problems: Problems) -> None:
    """Adds to `problems` what is wrong with `config`. `given` holds only what the user wrote."""
    _check_data(config, given, problems)
    _check_model(config, problems)
    _check_loss(config, problems)
    _check_batches(config, given, problems)
    _check_optimizer(config, given, problems)
    _check_evaluation(config, given, problems)
    _check_trackers(config, problems)
    if config.resume not in ("auto", "never") and not Path(config.resume).is_dir():
        problems.add("resume", f"{config.resume!r} is neither auto, never, nor the folder of a checkpoint.")


def _check_data(config: Config, given: dict, problems: Problems) -> None:
    from .data.files import FORMATS
    from .data.records import SCHEMAS

    if not config.datasets:
        problems.add("datasets", "is missing: name at least one file, for example datasets=[data.jsonl].")
    for name, entries in (("datasets", config.datasets), ("eval_datasets", config.eval_datasets)):
        for i, entry in enumerate(entries):
            key, path = f"{name}[{i}]", Path(entry.path)
            if path.is_dir():
                problems.add(f"{key}.path", f"{path} is a folder; name a file in it.")
            elif not path.exists():
                problems.add(f"{key}.path", f"there is no file {path} (seen from {Path.cwd()}).")
            elif not os.access(path, os.R_OK):
                problems.add(f"{key}.path", f"no permission to read {path}.")
            elif path.name.removesuffix(".gz").rpartition(".")[2].lower() not in FORMATS:
                problems.add(f"{key}.path", f"{path.name} is no .{', .'.join(FORMATS)} file (.gz behind it is fine).")
            if entry.type is not None and entry.type not in SCHEMAS:
                hint = nearest(entry.type, list(SCHEMAS))
                problems.add(f"{key}.type", f"{entry.type!r} is not one of {', '.join(SCHEMAS)}.{hint}")
            if name == "eval_datasets" and entry.weight != 1:
                problems.add(f"{key}.weight", "has no meaning for evaluation, which sees every example once.")
    if config.validation_split and config.eval_datasets:
        problems.add("validation_split", "would be ignored beside eval_datasets; give one of them.")
    if config.validation_split > 1 and config.validation_split != int(config.validation_split):
        problems.add("validation_split", "is a share below 1 or a whole number of examples.")
    if config.chat_template not in ("auto", "chatml", "none") and not Path(config.chat_template).is_file():
        problems.add("chat_template", f"{config.chat_template!r} is neither auto, chatml, none, nor a file.")
    if config.packing and config.group_by_length:
        problems.add("group_by_length", "would be of no use beside packing, which leaves no padding; give one of them.")
    if "max_bad_rows" in given and config.on_bad_row == "error":
        problems.add("max_bad_rows", "would be ignored: it needs on_bad_row=skip.")


def _check_model(config: Config, problems: Problems) -> None:
    name = config.model.name_or_path
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()
    if name != "tiny" and looks_local:
        if not Path(name).is_dir():
            problems.add("model.name_or_path", f"there is no folder {name} (seen from {Path.cwd()}).")
        elif not (Path(name) / "config.json").is_file():
            problems.add("model.name_or_path", f"{name} holds no config.json, so it is not a model's folder.")
    tokenizer = config.model.tokenizer_name_or_path
    if tokenizer and tokenizer.startswith((".", "/")) and not Path(tokenizer).is_dir():
        problems.add("model.tokenizer_name_or_path", f"there is no folder {tokenizer} (seen from {Path.cwd()}).")
    archive = config.model.archive
    if archive and not (Path(archive).is_file() and archive.endswith((".pt", ".bin", ".safetensors"))):
        problems.add("model.archive", f"{archive} is not a .safetensors, .pt or .bin file that exists.")
    for entry in config.freeze_layers:
        if not re.fullmatch(r"\d+(-\d+)?|embeddings", str(entry)):
            problems.add("freeze_layers", f"{entry!r} is neither a number, a range like 0-5, nor `embeddings`.")


def _check_loss(config: Config, problems: Problems) -> None:
    from .losses import registered

    name = config.loss.get("name")
    if name not in registered():
        known = list(registered())
        problems.add(
            "loss.name", f"there is no loss {name!r}; there are {', '.join(known)}.{nearest(str(name), known)}"
        )
        return
    options = {key: value for key, value in config.loss.items() if key != "name"}
    walk_options(registered()[name].options_class, options, "loss.", problems)


def _check_batches(config: Config, given: dict, problems: Problems) -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        problems.add("trainer", f"BasicTrainer trains on one device, but torchrun started {world_size} processes.")
    if config.total_batch_size % config.gradient_accumulation_steps:
        problems.add(
            "total_batch_size",
            f"{config.total_batch_size} examples cannot be cut into gradient_accumulation_steps="
            f"{config.gradient_accumulation_steps} equal micro-batches.",
        )
    if "n_epochs" in given and config.n_steps is not None:
        problems.add("n_epochs", "would be ignored beside n_steps; give one of them.")
    if config.warmup_steps and config.warmup_ratio:
        problems.add("warmup_ratio", "would be ignored beside warmup_steps; give one of them.")
    if config.n_steps is not None and config.warmup_steps > config.n_steps:
        problems.add("warmup_steps", f"{config.warmup_steps} is more than n_steps={config.n_steps}.")


def _check_optimizer(config: Config, given: dict, problems: Problems) -> None:
    from .engine.optim import optimizer_class

    try:
        chosen = optimizer_class(config.optimizer, UNFIT_OPTIMIZERS)
    except ConfigError as error:
        problems.add("optimizer", str(error))
        return
    accepted = list(inspect.signature(chosen).parameters)
    for key in ("betas", "eps", "weight_decay"):
        if key in given and key not in accepted:
            problems.add(key, f"would be ignored: {chosen.__name__} has no {key}.")
    for key in config.optimizer_args:
        if key not in accepted or key in ("params", "lr", "betas", "eps", "weight_decay"):
            problems.add(f"optimizer_args.{key}", f"{chosen.__name__} takes {', '.join(accepted[2:])}.")
    if len(config.betas) != 2 or not all(0 <= beta < 1 for beta in config.betas):
        problems.add("betas", f"expected two numbers from 0 to below 1, got {config.betas}.")


def _check_evaluation(config: Config, given: dict, problems: Problems) -> None:
    if config.eval_datasets or config.validation_split:
        if config.n_eval_examples and config.eval_generate.n_examples > config.n_eval_examples:
            problems.add("eval_generate.n_examples", f"is more than n_eval_examples={config.n_eval_examples}.")
    else:
        needs_data = "would be ignored: there is nothing to evaluate on. Give eval_datasets or validation_split."
        for key in ("do_first_eval", "eval_every_steps", "n_eval_examples", "eval_batch_size", "save_best"):
            if given.get(key):
                problems.add(key, needs_data)
        for key in ("eval_generate", "early_stopping"):
            if given.get(key):
                problems.add(key, needs_data)
    if config.early_stopping.patience and not config.eval_every_steps:
        problems.add("early_stopping.patience", "would be ignored: it needs eval_every_steps.")
    if config.early_stopping.metric == "exact_match" and not config.eval_generate.n_examples:
        problems.add("early_stopping.metric", "exact_match needs eval_generate.n_examples.")


def _check_trackers(config: Config, problems: Problems) -> None:
    from importlib.util import find_spec

    if config.report_to_tensorboard and find_spec("tensorboard") is None:
        problems.add("report_to_tensorboard", "the package tensorboard is not installed: pip install tensorboard")
    if config.swanlab.enabled and find_spec("swanlab") is None:
        problems.add("swanlab.enabled", "the package swanlab is not installed: pip install swanlab")
