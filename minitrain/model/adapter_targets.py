"""Which layers of a model the options of an adapter name, by PEFT's rules."""

import difflib
import re
from typing import Any

from torch import nn

from minitrain.errors import ConfigError
from minitrain.io.system import time_limit

from . import experts, lora
from .decoder import find_blocks
from .peft_rules import find_unloadable

MATCH_SECONDS = 2
DROPOUT = "minitrain_lora_dropout"  # in adapter_config.json if PEFT requires lora_dropout=0, which target_parameters do


def target_layers(
    model: nn.Module, modules: dict[str, nn.Module], config: dict[str, Any], modules_to_save: list[str], strict: bool
) -> list[str]:
    """Return the names of the layers to adapt, in the model's order, without modules that are trained in full."""
    targets, excluded = config["target_modules"], config.get("exclude_modules")
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    head = model.get_output_embeddings()
    trained_modules = {module for name in modules_to_save for module in modules[name].modules()}
    adaptable = {name: module for name, module in modules.items() if lora.is_adaptable(module)}
    if targets == "all-linear":
        linear = [n for n, module in adaptable.items() if not isinstance(module, nn.Embedding) and module is not head]
        unloadable = find_unloadable(model, linear)
        matching = [name for name in linear if name not in unloadable]
    else:
        matching = [name for name in adaptable if _matches(targets, name) or _is_parameter_target(config, name)]
    missing = (
        [target for target in targets if not any(_matches([target], name) for name in matching)]
        if _is_list(targets)
        else []
    )
    if not matching or (missing and strict):
        raise ConfigError(
            f"lora.target_modules: {unknown_module(missing[0] if missing else targets, adaptable)}", "not-a-choice"
        )
    unmatched = (
        [entry for entry in excluded if not any(_matches([entry], name) for name in matching)]
        if _is_list(excluded)
        else []
    )
    if unmatched and strict:
        known = {name: adaptable[name] for name in matching}
        raise ConfigError(f"lora.exclude_modules: {unknown_module(unmatched[0], known)}", "not-a-choice")
    names = [
        n
        for n in matching
        if adaptable[n] not in trained_modules and not (excluded and _matches(excluded, n, "exclude_modules"))
    ]
    if not names:
        raise ConfigError(
            f"lora.target_modules: all matching layers, such as {matching[0]}, are in exclude_modules or "
            "modules_to_save. Name another layer.",
            "conflict",
        )
    return _filter_by_block(model, modules, names, layers) if layers else names


def target_parameters(
    model: nn.Module, modules: dict[str, nn.Module], config: dict[str, Any], modules_to_save: list[str], strict: bool
) -> dict[str, nn.Module]:
    """Return the modules of the parameters to adapt by name, without modules that are trained in full.

    PEFT ignores layers_to_transform for parameters, so only new adapters (`strict`) use it.
    """
    if not (targets := config.get("target_parameters")):
        return {}
    if not strict and not (targets := [one for one in targets if one not in layer_weights(config, modules)]):
        return {}
    matching = experts.find_parameters(model, targets)
    names = [name for name in matching if not any(name.startswith(f"{path}.") for path in modules_to_save)]
    if not names:
        raise ConfigError(
            f"lora.target_parameters: all matching parameters, such as {matching[0]}, are in modules_to_save. "
            "Remove them from one of both.",
            "conflict",
        )
    if strict and (layers := config.get("layers_to_transform")):
        names = _filter_by_block(model, modules, names, layers)
    return {name: modules[name.rpartition(".")[0]] for name in names}


def _filter_by_block(model: nn.Module, modules: dict[str, nn.Module], names: list[str], layers: list[int]) -> list[str]:
    """Return the names in the blocks with these numbers."""
    blocks = find_blocks(model)
    path = next(name for name, module in modules.items() if module is blocks)
    outside = [number for number in layers if not 0 <= number < len(blocks)]
    if outside:
        raise ConfigError(
            f"lora.layers_to_transform: {outside[0]} is out of range. The model has blocks 0-{len(blocks) - 1}.",
            "out-of-range",
        )
    in_blocks = [name for name in names if any(name.startswith(f"{path}.{number}.") for number in layers)]
    if not in_blocks:
        raise ConfigError(
            f"lora.layers_to_transform: these blocks have no target layer (such as {names[0]}). Choose other blocks.",
            "invalid-value",
        )
    return in_blocks


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, set))


def _matches(patterns: Any, name: str, key: str = "target_modules") -> bool:
    """Return whether a layer's name ends with a name in a list, or matches a regular expression in full, as in PEFT."""
    if _is_list(patterns):
        return any(name == suffix or name.endswith(f".{suffix}") for suffix in patterns)
    return _full_match(patterns, name, key) or name == patterns or name.endswith(f".{patterns}")


def _full_match(expression: str, name: str, key: str) -> bool:
    """Return whether a regular expression matches a full name. Raises ConfigError if it is invalid or too slow."""
    try:
        with time_limit(MATCH_SECONDS):
            return re.fullmatch(expression, name) is not None
    except re.error as error:
        raise ConfigError(
            f"lora.{key}: {expression!r} is not a valid regular expression: {error}.", "invalid-value"
        ) from None
    except TimeoutError:
        raise ConfigError(
            f"lora.{key}: matching {expression!r} with {name} takes more than {MATCH_SECONDS} seconds. "
            "Use a simpler expression, or a list of names.",
            "invalid-value",
        ) from None


def unknown_module(pattern: str, modules: dict[str, nn.Module]) -> str:
    available = sorted({name.rpartition(".")[2] for name in modules if name and not name.rpartition(".")[2].isdigit()})
    near = difflib.get_close_matches(pattern.rpartition(".")[2], available, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"no module is named {pattern!r}.{hint} The model has {', '.join(available)}."


def layer_weights(config: dict[str, Any], modules: dict[str, nn.Module]) -> list[str]:
    """Return the names in target_parameters that are weights of linear layers, on which LoRA is that of the layer."""
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear) and lora.is_adaptable(module)]
    targets = config.get("target_parameters") or []
    return [one for one in targets if any(_matches([one], f"{name}.weight") for name in linear)]


def _is_parameter_target(config: dict[str, Any], name: str) -> bool:
    """Return whether the weight of a layer is in target_parameters."""
    targets = config.get("target_parameters") or []
    return _is_list(targets) and _matches(targets, f"{name}.weight")


def rank_and_alpha(config: dict[str, Any], name: str) -> tuple[int, float]:
    """Return the rank and the alpha of a layer or a parameter; patterns match the names of target_parameters."""
    key = f"{name}.weight" if _is_parameter_target(config, name) else name
    rank = _pattern_value(config, "rank_pattern", key, config["r"])
    return rank, _pattern_value(config, "alpha_pattern", key, config["lora_alpha"])


def _pattern_value(config: dict[str, Any], patterns: str, name: str, default: Any) -> Any:
    for key, value in (config.get(patterns) or {}).items():
        if _full_match(rf"(.*\.)?({key})", name, patterns):
            return value
    return default
