"""The names of an adapter's layers and tensors in PEFT's files."""

import re
from typing import Any

from torch import nn

from minitrain.errors import ConfigError

from . import experts, lora, token_rows
from .adapter import Adapter
from .adapter_targets import DROPOUT, rank_and_alpha
from .multimodal import all_module_names
from .peft_rules import PREFIX, find_targets, find_unloadable, saved_keys


def peft_name(name: str, adapter: Adapter) -> str:
    """`model.layers.0.q_proj.lora_A` -> `base_model.model.model.layers.0.q_proj.lora_A.weight`."""
    module, _, last = name.rpartition(".")
    if last == token_rows.NAME:
        return f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"
    if last in ("lora_A", "lora_B"):
        return f"{PREFIX}{name}.weight"
    if experts.is_matrix_name(last):
        return experts.peft_key(f"{PREFIX}{module}", adapter.experts[f"{module}.{last[: -len(experts.A)]}"], last)
    inner = ".base_layer" if module in adapter.layers and last not in lora.MATRICES else ""
    return f"{PREFIX}{module}{inner}.{last}"


def check_loadable(model: nn.Module, adapter: Adapter, key: str, remedy: str) -> None:
    """Raise ConfigError if PEFT will not load the adapter.

    Args:
        model: The transformers model.
        adapter: Its adapter.
        key: The option that the error names.
        remedy: What to do with a layer.
    """
    unloadable = find_unloadable(model, adapter.layers)
    keys = {peft_name(f"{name}{experts.A}", adapter): name for name in adapter.experts}
    unloadable |= {keys[one]: "PEFT renames its tensors" for one in keys.keys() - saved_keys(model, keys).keys()}
    for name, reason in unloadable.items():
        raise ConfigError(f"{key}: LoRA on {name} is not supported: {reason}. {remedy}.", "unsupported-model")
    targets = _find_targets(model, adapter)
    if targets is None:
        reason = f"PEFT has no names for these layers alone, such as {next(iter(adapter.layers))}. Choose other layers"
        raise ConfigError(f"{key}: {reason}.", "unsupported-model")
    if targets[1] and adapter.config.get("use_dora"):
        name, model_type = targets[1][0].removesuffix(".weight"), model.config.model_type
        reason = f"DoRA on {name} is not supported: PEFT has none for it in the model type {model_type}"
        raise ConfigError(f"{key}: {reason}. {remedy}, or do without DoRA.", "unsupported-model")


def target_options(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """Return the options of adapter_config.json with which PEFT adapts the layers and parameters of an adapter."""
    old = adapter.config
    modules, parameters = _find_targets(model, adapter)
    config = {"target_modules": modules, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    config["target_parameters"] = parameters + experts.shortest_targets(model, list(adapter.experts)) or None
    if parameters:
        dropout = old.get(DROPOUT, old.get("lora_dropout"))
        config |= {"lora_dropout": 0.0, **({DROPOUT: dropout} if dropout else {})}
    if config["target_parameters"] or old.get("target_parameters"):  # patterns match names of parameters, too
        names = {name: f"{name}.weight" if f"{name}.weight" in parameters else name for name in adapter.layers}
        names |= {name: name for name in adapter.experts}
        values = {re.escape(key): rank_and_alpha(old, name) for name, key in names.items()}
        config["rank_pattern"] = {key: rank for key, (rank, _) in values.items() if rank != old["r"]}
        config["alpha_pattern"] = {key: alpha for key, (_, alpha) in values.items() if alpha != old["lora_alpha"]}
    return config


def _find_targets(model: nn.Module, adapter: Adapter) -> tuple[list[str] | str, list[str]] | None:
    """Return target_modules and target_parameters of the layers of an adapter, also of those that are not trained."""
    others = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in adapter.other_tensors if ".lora_" in key}
    return find_targets(model.config, all_module_names(model), adapter.layers.keys() | others, adapter.modules_to_save)
