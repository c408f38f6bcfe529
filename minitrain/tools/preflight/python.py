"""The config of a trainer that is given rows, a model or an optimizer in Python."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitrain.config.load import check_writable, default_config, merge_loss, parse_config
from minitrain.config.python_objects import PythonObject
from minitrain.config.saved import to_plain
from minitrain.config.schema import Config, option_fields
from minitrain.data.rows import rows_object
from minitrain.distributed.process import world_size
from minitrain.errors import ConfigError
from minitrain.losses import Loss, create_loss, describe_loss, loss_options
from minitrain.model.given import model_object, tokenizer_object
from minitrain.training.optim import optimizer_object

from .load import check_parsed, check_python_config, load_config

MAKE = {
    "model": model_object,
    "tokenizer": tokenizer_object,
    "train_dataset": lambda rows: rows_object(rows, "train_dataset"),
    "eval_dataset": lambda rows: rows_object(rows, "eval_dataset"),
    "optimizer": optimizer_object,
}
# The options that have an effect in a Session; the loop decides the rest.
OF_SESSION = {
    *("exp_name", "seed", "device", "trainer", "fsdp", "quiet", "debug"),
    *("chat_template", "chat_template_kwargs", "train_on", "train_on_reasoning", "on_missing", "split_special_tokens"),
    *("max_length", "max_prompt_length", "truncation", "mask_truncated", "packing", "on_bad_row", "max_bad_rows"),
    *("model", "lora", "soft_prompt", "freeze_layers", "loss", "lr", "weight_decay", "betas", "eps", "max_grad_norm"),
    *("optimizer", "optimizer_args", "gradient_accumulation_steps", "max_tokens_per_micro_batch", "eval_batch_size"),
    *("activation_checkpointing", "activation_offload", "compile"),
}
EXAMPLES_OF_CALLS = [{"text": "the rows of each call"}]  # a config needs data


def config_with(
    source: Config | Mapping[str, Any] | str | Path, loss: Loss | None, given: Mapping[str, Any], **changes: Any
) -> tuple[Config, list[PythonObject]]:
    """Return a checked config that names what was given in Python, and these objects.

    Args:
        source: A config, the path of a YAML file, or a dict of its keys.
        given: By the name of the argument of `Trainer`; None was not given.
        changes: Other options that differ.

    Raises:
        ConfigError: Also when the config names another model or other data than those that are given.
    """
    objects = {name: MAKE[name](value) for name, value in given.items() if value is not None}
    described = None if loss is None else describe_loss(loss)
    options: dict[str, Any] = dict(changes)
    if objects:
        config = source if isinstance(source, Config) else parse_config(source, loss_options)[0]
        _check_rivals(config, objects)
        options |= _options(objects)
    if isinstance(source, Config):
        named = copy.copy(source)  # with attributes that are not options, too, which are refused
        if "model" in options:
            options["model"] = to_plain(source.model) | options["model"]
        for key, value in options.items():
            setattr(named, key, value)
        return check_python_config(named, described), list(objects.values())
    if loss is None:
        return load_config(source, **options), list(objects.values())
    parsed, issues = parse_config(source, loss_options, options=options)
    parsed.loss = merge_loss(parsed.loss, described)
    check_parsed(parsed, issues, loss_is_object=True)
    check_writable(parsed)
    return parsed, list(objects.values())


def session_config(
    source: Config | Mapping[str, Any] | str | Path, loss: Loss | None, given: Mapping[str, Any]
) -> tuple[Config, list[PythonObject]]:
    """Return a checked config for a `Session`, and the objects that were given in Python; see `config_with`.

    Raises:
        ConfigError: Also for options that a `Session` does not use.
    """
    named, defaults = source, default_config()
    if not isinstance(source, Config):
        named, issues = parse_config(source, loss_options)
        issues.raise_if_any()
    names = [f.name for f in option_fields(Config)]
    if unused := [name for name in names if name not in OF_SESSION and getattr(named, name) != getattr(defaults, name)]:
        raise ConfigError(" ".join(f"{name}: has no effect in a Session. Remove it." for name in unused), "no-effect")
    total = named.gradient_accumulation_steps * world_size()  # the examples of a call need not be a multiple of it
    return config_with(source, loss, {**given, "train_dataset": EXAMPLES_OF_CALLS}, total_batch_size=total)


def loss_object(loss: Loss | str | None) -> Loss | None:
    """Return the loss that is given by itself or by name. Raises ConfigError for anything else."""
    if loss is None or isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        return create_loss(loss)
    example = "Give create_loss('sft'), an object of a subclass of Loss, or a name."
    raise ConfigError(f"loss: expected a Loss, got {loss!r}. {example}", "wrong-type")


def _options(objects: Mapping[str, PythonObject]) -> dict[str, Any]:
    """Return the options that name the objects."""
    options: dict[str, Any] = {}
    for argument, key in (("train_dataset", "datasets"), ("eval_dataset", "eval_datasets")):
        if argument in objects:
            options[key] = [{"path": objects[argument].identifier}]
    if "optimizer" in objects:
        options["optimizer"] = objects["optimizer"].identifier
    model = {}
    if "model" in objects:
        model["name_or_path"] = objects["model"].identifier
    if "tokenizer" in objects:
        model["tokenizer_name_or_path"] = objects["tokenizer"].identifier
    if model:
        options["model"] = model
    return options


def _check_rivals(config: Config, objects: Mapping[str, PythonObject]) -> None:
    """Raise ConfigError when a config names something else than what is given in Python."""
    model = to_plain(config.model)
    named = {
        "train_dataset": ("datasets", config.datasets),
        "eval_dataset": ("eval_datasets", config.eval_datasets),
        "tokenizer": ("model.tokenizer_name_or_path", model.get("tokenizer_name_or_path")),
        "model": ("model.name_or_path", model.get("name_or_path")),
        "optimizer": ("optimizer", None if config.optimizer == Config.optimizer else config.optimizer),
    }
    for argument, given in objects.items():
        key, value = named[argument]
        loaded_from = getattr(given.value, "name_or_path", None)
        if value and not (argument in ("model", "tokenizer") and value == loaded_from):
            raise ConfigError(f"{key}: conflicts with Trainer({argument}=...). Set only one of them.", "conflict")
    if "model" in objects and not ("tokenizer" in objects or model.get("tokenizer_name_or_path")):
        raise ConfigError(
            "tokenizer: is needed with a model from Python. Give Trainer(tokenizer=...).", "missing-option"
        )
