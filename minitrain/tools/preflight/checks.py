"""What is wrong with a config and its types cannot say.

That is: options that contradict each other, would be ignored, or name what is not there.
"""

import math
import os
import re
from dataclasses import fields
from pathlib import Path

from minitrain.config.aliases import MUTUALLY_EXCLUSIVE
from minitrain.config.issues import ConfigIssues, check_types, related, shown
from minitrain.config.load import default_config
from minitrain.config.schema import Config, all_keys, option_fields
from minitrain.config.suggest import hint_for_value, nearest
from minitrain.distributed.process import world_size
from minitrain.errors import ConfigError
from minitrain.io.paths import looks_local, near_file

from .paths import check_archive, check_folder, check_source

# They do not step on a gradient alone, or take only some shapes of parameters.
UNFIT_OPTIMIZERS = {"Optimizer", "LBFGS", "SparseAdam", "Muon"}
WHOLE_MATRIX_OPTIMIZERS = {"Adafactor"}
ATTENTION_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
CHECKED_WITH_TORCH = {"loss", "optimizer", "optimizer_args", "betas", "eps", "weight_decay", "device", "fsdp"}
NEEDS_EVAL_DATA = ("eval_every_steps", "n_eval_examples", "eval_batch_size", "save_best")


def check_config(config: Config, issues: ConfigIssues, loss_is_object: bool = False) -> None:
    """Add to `issues` what is wrong with a config. An option at its default does not count as ignored.

    Args:
        loss_is_object: The loss was given in Python, so its class need not be registered.
    """
    defaults = default_config()
    given = {f.name for f in option_fields(Config) if getattr(config, f.name) != getattr(defaults, f.name)}
    _check_run(config, given, issues)
    _check_files(config, issues)
    _check_data(config, given, issues)
    _check_model(config, issues)
    _check_adapter(config, given, issues)
    _check_steps(config, issues)
    _check_evaluation(config, given, issues)
    if issues.found and not given & CHECKED_WITH_TORCH:
        return  # torch takes seconds to import, and options at their default are rarely wrong
    _check_device(config, issues)
    _check_loss(config, given, issues, loss_is_object)
    _check_optimizer(config, given, issues)


def _check_run(config: Config, given: set[str], issues: ConfigIssues) -> None:
    from importlib.util import find_spec

    if config.exp_name in (".", "..") or re.search(r"[/\\\0]", config.exp_name):
        issues.add("exp_name", f"{config.exp_name!r} is not the name of a folder; set output_dir for its place.")
    if config.resume not in ("auto", "never") and not Path(config.resume).is_dir():
        issues.add("resume", f"{config.resume!r} is neither auto, never, nor the folder of a checkpoint.")
    for key in config.allow_changes:
        if not any(related(key, known) for known in all_keys()):
            issues.add("allow_changes", f"there is no option {key!r}.{nearest(key, all_keys())}")
    _check_processes(config, given, issues)
    if config.keep_models and not config.save_models_every_steps:
        issues.add("keep_models", "would be ignored: it needs save_models_every_steps.", "save_models_every_steps")
    if config.report_to_tensorboard and find_spec("tensorboard") is None:
        issues.add("report_to_tensorboard", "the package tensorboard is not installed: pip install tensorboard")
    for name in ("wandb", "swanlab"):
        if getattr(config, name).enabled and find_spec(name) is None:
            issues.add(f"{name}.enabled", f"the package {name} is not installed: pip install {name}")


def _check_processes(config: Config, given: set[str], issues: ConfigIssues) -> None:
    """`given`: names of the options that are not at their default."""
    processes, local = world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if config.trainer == "BasicTrainer":
        if processes > 1:
            issues.add(
                "trainer",
                f"BasicTrainer trains on one device, but torchrun started {processes} processes. "
                "Set trainer=FSDPTrainer.",
            )
        if "fsdp" in given:
            issues.add("fsdp", "would be ignored: it needs trainer=FSDPTrainer.", "trainer")
    elif config.fsdp.shard == "hybrid" and (processes == local or processes % local):
        issues.add("fsdp.shard", "hybrid needs several machines with equally many processes; use full on one.")


def _check_device(config: Config, issues: ConfigIssues) -> None:
    import torch

    from minitrain.distributed.parallel import pick_device

    try:
        device = pick_device(config.device).type
    except ConfigError as error:
        issues.add("device", str(error).removeprefix("device: ") + ".")
        return
    if config.trainer == "BasicTrainer":
        return
    local, n_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if device == "mps":
        issues.add("trainer", "FSDPTrainer needs CUDA devices or the CPU; use device=cpu, or BasicTrainer.")
    if device == "cuda" and local > n_gpus:
        issues.add("trainer", f"torchrun started {local} processes on this machine, but it has {n_gpus} GPUs.")
    if config.fsdp.cpu_offload and device == "cpu":
        issues.add("fsdp.cpu_offload", "would be ignored: everything is on the CPU already.")


def _check_files(config: Config, issues: ConfigIssues) -> None:
    from minitrain.data.examples import SCHEMAS

    if not config.datasets:
        issues.add("datasets", "is missing: name at least one file, for example datasets=[data.jsonl].")
    for name, entries in (("datasets", config.datasets), ("eval_datasets", config.eval_datasets)):
        for i, entry in enumerate(entries):
            key = f"{name}[{i}]"
            check_source(key, entry, issues)
            if entry.type is not None and entry.type not in SCHEMAS:
                hint = hint_for_value(f"{key}.type", entry.type, SCHEMAS)
                issues.add(f"{key}.type", f"{entry.type!r} is not one of {', '.join(SCHEMAS)}.{hint}")
            if name == "eval_datasets" and entry.weight != 1:
                issues.add(f"{key}.weight", "has no meaning for evaluation, which sees every example once.")


def _check_data(config: Config, given: set[str], issues: ConfigIssues) -> None:
    for winner, loser in MUTUALLY_EXCLUSIVE:
        if winner in given and loser in given:
            issues.add(loser, f"would be ignored beside {winner}; give one of them.", winner)
    if config.validation_split > 1 and config.validation_split != int(config.validation_split):
        issues.add("validation_split", "is a share below 1 or a whole number of examples.")
    if config.chat_template not in ("auto", "chatml", "none"):
        try:
            Path(config.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError, ValueError):
            told = f"{config.chat_template!r} is neither auto, chatml, none, nor a text file."
            issues.add("chat_template", told + hint_for_value("chat_template", config.chat_template))
    if "max_bad_rows" in given and config.on_bad_row == "error":
        issues.add("max_bad_rows", "would be ignored: it needs on_bad_row=skip.", "on_bad_row")


def _check_model(config: Config, issues: ConfigIssues) -> None:
    from importlib.util import find_spec

    model = config.model
    key = "model.name_or_path"
    check_folder(key, model.name_or_path, "name its base model here, and model.adapter={}", issues)
    if model.revision is not None and (model.name_or_path == "tiny" or looks_local(model.name_or_path)):
        issues.add("model.revision", "would be ignored: the model does not come from the hub.", key)
    tokenizer = model.tokenizer_name_or_path
    if tokenizer and looks_local(tokenizer) and not Path(tokenizer).is_dir():
        issues.add("model.tokenizer_name_or_path", f"there is no folder {tokenizer} (seen from {Path.cwd()}).")
    if model.archive:
        check_archive(Path(model.archive), issues)
    for name, package in ATTENTION_PACKAGES.items():
        if model.attn_implementation == name and find_spec(package) is None:
            issues.add("model.attn_implementation", f"the package {package} is not installed; use auto.")
    for entry in config.freeze_layers:
        if not re.fullmatch(r"\d+(-\d+)?|embeddings", str(entry)):
            issues.add("freeze_layers", f"{entry!r} is neither a number, a range like 0-5, nor `embeddings`.")
        elif entry != "embeddings" and _is_reversed(str(entry)):
            issues.add("freeze_layers", f"the range {entry} ends before it begins. Write the smaller number first.")


def _is_reversed(span: str) -> bool:
    first, _, last = span.partition("-")
    return bool(last) and int(last) < int(first)


def _check_adapter(config: Config, given: set[str], issues: ConfigIssues) -> None:
    from importlib.util import find_spec

    model, folder = config.model, Path(config.model.adapter or "")
    if model.adapter and not (folder / "adapter_config.json").is_file():
        inner = f" Its adapter is {folder / 'final'}." if (folder / "final" / "adapter_config.json").is_file() else ""
        issues.add("model.adapter", f"{folder} holds no adapter_config.json, so it is no adapter.{inner}")
    if model.adapter and "lora" in given:
        issues.add("lora", "would be ignored beside model.adapter, which says itself what it is.", "model.adapter")
    if model.adapter and "soft_prompt" in given:
        issues.add("soft_prompt", "would be ignored beside model.adapter, which says itself what it is.")
    elif "soft_prompt" in given:
        _check_prompt(config, issues)
    if "lora" in given and not model.adapter and not config.lora.rank:
        issues.add("lora", "would be ignored: it needs lora.rank, for example lora.rank=16.", "lora.rank")
    wanted = config.lora.target_modules
    if not isinstance(wanted, str) and not (isinstance(wanted, list) and all(isinstance(one, str) for one in wanted)):
        issues.add("lora.target_modules", "expected names in a list, a regular expression, or all-linear.")
    elif config.lora.rank and not wanted:
        issues.add("lora.target_modules", "is empty, so that nothing would be trained. Name layers, or leave it out.")
    elif isinstance(wanted, str) and (error := _no_expression(wanted)):
        issues.add("lora.target_modules", f"{wanted!r} is no regular expression: {error}.")
    has_adapter = config.lora.rank > 0 or config.soft_prompt.num_virtual_tokens > 0 or model.adapter is not None
    if has_adapter and config.freeze_layers:
        told = "would be ignored: with an adapter the whole model is frozen. See lora.layers_to_transform."
        issues.add("freeze_layers", told, "lora.rank")
    if has_adapter and model.archive:
        told = (
            "would be lost: an adapter's files name model.name_or_path as its base. Name a folder with these weights "
        )
        issues.add("model.archive", told + "there, and leave model.archive out.", "lora.rank")
    if has_adapter and model.master_dtype != "float32":
        issues.add("model.master_dtype", "would be ignored: adapters are trained in float32.", "lora.rank")
    if model.quantization == "none":
        return
    if not has_adapter:
        told = "quantised weights cannot be trained; it needs lora.rank or soft_prompt."
        issues.add("model.quantization", told, "lora.rank")
    if find_spec("bitsandbytes") is None:
        issues.add("model.quantization", "the package bitsandbytes is not installed: pip install minitrain[quant]")
    if config.trainer == "FSDPTrainer":
        told = "bitsandbytes packs weights so that FSDP2 cannot cut them by rows; use trainer=BasicTrainer, or none."
        issues.add("model.quantization", told, "trainer")
    if config.lora.init in ("pissa", "olora"):
        issues.add("lora.init", f"{config.lora.init} changes the weights, which quantisation has packed.")


def _check_prompt(config: Config, issues: ConfigIssues) -> None:
    prompt = config.soft_prompt
    if not prompt.num_virtual_tokens:
        told = "would be ignored: it needs soft_prompt.num_virtual_tokens, for example 20."
        issues.add("soft_prompt", told, "soft_prompt.num_virtual_tokens")
    if config.lora.rank:
        issues.add("soft_prompt", "cannot be trained together with lora; give one of them.", "lora.rank")
    if config.packing:
        told = "examples of one row would need prompts of their own; set packing=false (group_by_length saves padding)."
        issues.add("packing", told, "soft_prompt")
    if prompt.method == "prefix" and prompt.init_text:
        issues.add("soft_prompt.init_text", "would be ignored: it needs soft_prompt.method=prompt.")
    if prompt.method == "prompt" and prompt.prefix_projection:
        issues.add("soft_prompt.prefix_projection", "would be ignored: it needs soft_prompt.method=prefix.")
    if prompt.encoder_hidden_size and not prompt.prefix_projection:
        told = "would be ignored: it needs soft_prompt.prefix_projection=true."
        issues.add("soft_prompt.encoder_hidden_size", told)


def _check_loss(config: Config, given: set[str], issues: ConfigIssues, is_object: bool) -> None:
    from minitrain.data.examples import SCHEMAS
    from minitrain.losses import registered
    from minitrain.losses.base import build_loss

    name, known = config.loss["name"], registered()
    known_name = isinstance(name, str) and name in known
    if not known_name and is_object:
        return
    if not known_name:
        hint = _of_python_class(str(name)) or hint_for_value("loss.name", name, known)
        issues.add("loss.name", f"there is no loss {name!r}; there are {', '.join(known)}.{hint}")
        return
    written = {key: value for key, value in config.loss.items() if key != "name"}
    for key in [key for key in written if key not in _options_of(known[name])]:
        if others := [other for other, one in known.items() if key in _options_of(one)]:
            have = f"{', '.join(others)} {'has' if len(others) == 1 else 'have'}"
            issues.add(f"loss.{key}", f"loss.name={name} has no such option; {have} it.")
    options = check_types(known[name].options_class, written, "loss.", issues)
    config.loss = {"name": name} | options
    loss = build_loss(name, options, written, issues)
    if loss is None:
        return
    _check_teacher(options, "teacher" in loss.needs, issues)
    for key in ("chat_template", "train_on", "max_prompt_length"):
        if loss.record == "labelled" and key in given:
            issues.add(key, f"would be ignored: {name} reads texts as they are.", "loss.name")
    if loss.record != "rollout" and config.mask_truncated:
        issues.add("mask_truncated", f"would be ignored: {name} does not learn from rollouts.", "loss.name")
    for key in ("truncation", "max_prompt_length"):
        if loss.record == "rollout" and key in given:
            issues.add(key, "would be ignored: rollouts are never cut. See mask_truncated.", "loss.name")
    for i, entry in enumerate(config.datasets):
        if entry.type in SCHEMAS and SCHEMAS[entry.type].kind != loss.record:
            told = f"{entry.type} rows are {SCHEMAS[entry.type].kind} rows, and {name} learns from {loss.record} rows."
            issues.add(f"datasets[{i}].type", told, "loss.name")
    if loss.record in ("feedback", "rollout") and config.eval_generate.n_examples:
        told = f"the answers of {loss.record} rows need not be right, so none can be compared with them."
        issues.add("eval_generate", told, "loss.name")
    if loss.outputs is not None and config.eval_generate.n_examples:
        issues.add("eval_generate", f"a model that {name} trains gives scores and no text.", "loss.name")


def _of_python_class(name: str) -> str:
    """What to do about the name that a run folder has of a loss object whose class is not registered."""
    if "." not in name:
        return ""
    return (
        " It was given in Python as an object of this class. Give it again, Trainer(config, loss=...), or register the "
        "class with register_loss and name its file with --plugin."
    )


def _options_of(loss: type) -> set[str]:
    return {f.name for f in fields(loss.options_class)}


def _check_teacher(options: dict, needed: bool, issues: ConfigIssues) -> None:
    """`options`: of the loss, those that are given."""
    name, outputs = options.get("teacher"), options.get("teacher_outputs")
    if name is not None:
        check_folder("loss.teacher", name, "make it part of its base model first: minitrain merge {}", issues)
    elif needed:
        told = "is missing: name the folder or the hub name of a model, or what it says with loss.teacher_outputs."
        issues.add("loss.teacher", told)
    if outputs is not None and Path(outputs).is_dir():
        issues.add("loss.teacher_outputs", f"{outputs} is a folder; name the file that `minitrain teach` made.")
    elif outputs is not None and not Path(outputs).is_file():
        told = f"there is no file {outputs} (seen from {Path.cwd()}); `minitrain teach` makes one."
        issues.add("loss.teacher_outputs", told + near_file(Path(outputs)))


def uneven_batch(config: Config, number: int, what: str) -> str | None:
    """What is wrong with the batch size on so many processes or devices, if anything is."""
    if config.total_batch_size % (config.gradient_accumulation_steps * number) == 0:
        return None
    over = f" on each of {number} {what}" if number > 1 else ""
    return (
        f"{config.total_batch_size} examples cannot be cut into gradient_accumulation_steps="
        f"{config.gradient_accumulation_steps} equal micro-batches{over}."
    )


def _check_steps(config: Config, issues: ConfigIssues) -> None:
    if uneven := uneven_batch(config, world_size(), "processes"):
        issues.add("total_batch_size", uneven)
    if config.n_steps is not None and config.warmup_steps > config.n_steps:
        issues.add("warmup_steps", f"{config.warmup_steps} is more than n_steps={config.n_steps}.")


def _check_optimizer(config: Config, given: set[str], issues: ConfigIssues) -> None:
    from minitrain.training.optim import accepted_options, check_optimizer, optimizer_class

    if len(config.betas) != 2 or not all(0 <= beta < 1 for beta in config.betas):
        issues.add("betas", f"expected two numbers from 0 to below 1, got {shown(config.betas)}.")
    try:
        chosen = optimizer_class(config.optimizer, UNFIT_OPTIMIZERS)
    except ConfigError as error:
        issues.add("optimizer", f"{error}{hint_for_value('optimizer', config.optimizer)}")
        return
    if config.trainer == "FSDPTrainer" and config.fsdp.shard != "none" and chosen.__name__ in WHOLE_MATRIX_OPTIMIZERS:
        told = f"{chosen.__name__} looks at whole matrices, which fsdp.shard={config.fsdp.shard} cuts up; use AdamW."
        issues.add("optimizer", told, "fsdp.shard")
    accepted = accepted_options(chosen)
    for key in ("betas", "eps", "weight_decay"):
        if key in given and key not in accepted:
            issues.add(key, f"would be ignored: {chosen.__name__} has no {key}.", "optimizer")
    own = [name for name in accepted if name not in ("params", "lr", "betas", "eps", "weight_decay")]
    for key, value in config.optimizer_args.items():
        if key not in own:
            issues.add(f"optimizer_args.{key}", f"{chosen.__name__} takes {', '.join(own)}.", "optimizer")
        elif isinstance(value, float) and not math.isfinite(value):
            issues.add(f"optimizer_args.{key}", f"expected a finite number, got {value}.")
    try:
        check_optimizer(config)
    except ConfigError as error:
        told = str(error).removeprefix("optimizer: ")
        issues.add("optimizer", told, "optimizer_args", "betas", "eps", "lr", "weight_decay")


def _check_evaluation(config: Config, given: set[str], issues: ConfigIssues) -> None:
    stopping, answers = config.early_stopping, config.eval_generate
    if not config.eval_datasets and not config.validation_split:
        needs_data = "would be ignored: there is nothing to evaluate on. Give eval_datasets or validation_split."
        for key in (*NEEDS_EVAL_DATA, "eval_generate", "early_stopping"):
            if key in given:
                issues.add(key, needs_data, "eval_datasets", "validation_split")
    if not answers.n_examples and "eval_generate" in given:
        told = "would be ignored: it needs eval_generate.n_examples, for example 20."
        issues.add("eval_generate", told, "eval_generate.n_examples")
    if answers.match not in ("text", "number") and not _has_one_group(answers.match):
        told = f"{answers.match!r} is neither text, number, nor a regular expression with one group in parentheses."
        issues.add("eval_generate.match", told + nearest(answers.match, ("text", "number")))
    if config.n_eval_examples and answers.n_examples > config.n_eval_examples:
        issues.add("eval_generate.n_examples", f"is more than n_eval_examples={config.n_eval_examples}.")
    if "early_stopping" in given and not stopping.patience and not config.save_best:
        told = "would be ignored: it needs early_stopping.patience, or save_best=true."
        issues.add("early_stopping", told, "early_stopping.patience", "save_best")
    if stopping.patience and not config.eval_every_steps:
        issues.add("early_stopping.patience", "would be ignored: it needs eval_every_steps.", "eval_every_steps")
    if stopping.metric == "exact_match" and not answers.n_examples:
        issues.add("early_stopping.metric", "exact_match needs eval_generate.n_examples.", "eval_generate")


def _no_expression(expression: str) -> str | None:
    """What is wrong with a regular expression, if anything is."""
    try:
        re.compile(expression)
    except re.error as error:
        return str(error)
    return None


def _has_one_group(expression: str) -> bool:
    try:
        return re.compile(expression).groups == 1
    except re.error:
        return False
