"""Read and check adapter_config.json, and create one from the options of a new adapter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from minitrain.config.schema import Config
from minitrain.errors import ConfigError

from .sequence_head import heads_of
from .soft_prompt import PEFT_TYPES

FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
HEADS = ("score.weight", ".classifier.weight", "classifier.out_proj.weight")  # keys of the last layer of a scalar head
REQUIRED = {"LORA": ("r", "lora_alpha", "target_modules"), "PROMPT": ("num_virtual_tokens",)}  # keys without default
MAX_RANK = 1 << 15  # a larger rank or number of vectors is a typo that would fill the memory
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights
# Unsupported features of PEFT.
UNSUPPORTED = (
    *("layer_replication", "lora_bias", "use_qalora"),
    *("alora_invocation_tokens", "megatron_config", "arrow_config", "use_bdlora", "velora_config", "monteclora_config"),
)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e30


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _are_by_pattern(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_valid, value.values()))


# Option of adapter_config.json -> predicate of valid values, and their description.
VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, f"an integer from 1 to {MAX_RANK}"),
    "lora_alpha": (_is_number, "a finite number"),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "target_modules": (
        lambda value: bool(value) and (isinstance(value, str) or _are_names(value)),
        "a list of layer names, or a regular expression",
    ),
    "target_parameters": (_are_names, "a list of parameter names"),
    "exclude_modules": (
        lambda value: isinstance(value, str) or _are_names(value),
        "a list of names, or a regular expression",
    ),
    "modules_to_save": (_are_names, "a list of module names"),
    "layers_to_transform": (
        lambda value: all(type(number) is int for number in (value if isinstance(value, list) else [value])),
        "a block number, or a list of them",
    ),
    "rank_pattern": (_are_by_pattern(_is_rank), f"integers from 1 to {MAX_RANK} by regular expression"),
    "alpha_pattern": (_are_by_pattern(_is_number), "finite numbers by regular expression"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "num_virtual_tokens": (_is_rank, f"an integer from 1 to {MAX_RANK}"),
}


def has_adapter(config: Config) -> bool:
    return bool(config.lora.rank or config.soft_prompt.num_virtual_tokens or config.model.adapter)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the adapter_config.json of a folder.

    Raises:
        ConfigError: It cannot be read, lacks a key, or uses an unsupported feature.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        peft_type = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / CONFIG_FILE}: cannot be read: {error}", "unreadable") from None
    if peft_type not in ("LORA", *PEFT_TYPES.values()):
        raise ConfigError(
            f"{folder / CONFIG_FILE}: peft_type must be LORA, {' or '.join(PEFT_TYPES.values())}, got {peft_type!r}.",
            "unsupported-model",
        )
    required = list(REQUIRED["LORA" if peft_type == "LORA" else "PROMPT"])
    if config.get("target_parameters") and not config.get("target_modules"):  # PEFT writes [] or null
        config.pop("target_modules", None)
        required.remove("target_modules")
    if missing := [key for key in required if config.get(key) is None]:
        raise ConfigError(
            f"{folder / CONFIG_FILE}: missing {', '.join(missing)}. Save the adapter again.", "invalid-value"
        )
    for key, (is_valid, expected) in VALUES.items():
        if config.get(key) is not None and not is_valid(config[key]):
            value = repr(config[key])[:100]
            raise ConfigError(f"{folder / CONFIG_FILE}: {key} must be {expected}, got {value}.", "invalid-value")
    unsupported = [*UNSUPPORTED, *(("lora_dropout", "use_dora") if config.get("target_parameters") else ())]
    for key in unsupported:
        if config.get(key):
            raise ConfigError(
                f"{folder / CONFIG_FILE}: {key} is not supported. Retrain the adapter without it.", "unsupported-model"
            )
    if isinstance(init := config.get("init_lora_weights"), str) and init.startswith(CHANGES_BASE):
        raise ConfigError(
            f"{folder}: the adapter was initialized with {init}, which changes the base model. "
            "Save it with path_initial_model_for_weight_conversion, which converts it to an ordinary LoRA.",
            "unsupported-model",
        )
    return {"bias": "none", "target_modules": []} | config  # torchtune writes only the required keys


def read_adapter_outputs(folder: Path) -> list[str] | None:
    """Return the labels of the scalar head of an adapter's model; None for a causal LM.

    Raises:
        ConfigError: The adapter has no labels and no head.
    """
    config = read_config(folder)
    if config.get("task_type") != "SEQ_CLS":
        return None
    if "minitrain_outputs" in config:
        return config["minitrain_outputs"]
    with safe_open(folder / FILE, "pt") as file:  # PEFT saves no labels
        heads = [key for key in file.keys() if key.endswith(HEADS)]  # noqa: SIM118
        if not heads:
            raise ConfigError(
                f"{folder}: the adapter has no head, so its labels are unknown. Save it with its head.", "mismatch"
            )
        return [f"LABEL_{number}" for number in range(file.get_slice(heads[0]).get_shape()[0])]


def base_config(config: Config, model: nn.Module) -> dict[str, Any]:
    """Return the keys of adapter_config.json about the base model."""
    quantization = config.model.quantization
    return {
        "task_type": "SEQ_CLS" if heads_of(model).trained else "CAUSAL_LM",
        "base_model_name_or_path": config.model.name_or_path,
        "revision": config.model.revision,
        **({"minitrain_quantization": quantization} if quantization != "none" else {}),
        **({"minitrain_outputs": list(model.config.id2label.values())} if heads_of(model).trained else {}),
    }


def new_config(config: Config, model: nn.Module) -> dict[str, Any]:
    """Return adapter_config.json of a new LoRA. A scalar head is new, so it is trained in full."""
    options = config.lora
    modules_to_save = [*options.modules_to_save, *heads_of(model).trained]
    return base_config(config, model) | {
        "peft_type": "LORA",
        "r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": options.target_modules,
        "target_parameters": options.target_parameters or None,
        "exclude_modules": options.exclude_modules,
        "layers_to_transform": options.layers_to_transform,
        "modules_to_save": modules_to_save or None,
        "bias": options.bias,
        "use_rslora": options.use_rslora,
        "use_dora": options.use_dora,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
    }
