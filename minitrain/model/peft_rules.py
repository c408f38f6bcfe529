"""The rules by which PEFT finds the layers of an adapter, and how to save an adapter so that it finds the right ones.

Experts were separate layers in transformers 4 and are one parameter in transformers 5. For such models, PEFT takes all
layers with the names of experts for experts, and drops the LoRA of those that still are layers (dense and shared MLPs).
It leaves `target_parameters` as they are, and LoRA on the weight of a layer has the same keys and effect as LoRA on the
layer. PEFT also renames the keys of an adapter like those of old model files.
"""

import re
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

PREFIX = "base_model.model."  # of keys in PEFT's files
EXPERT_NAMES = {  # by the conversion of transformers that a type of model uses
    "mixtral": {"gate", "w1", "w2", "w3"},
    "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"},
}
BYPASSED = {"out_proj", "conv1d"}  # layers of Mamba whose weights a fused kernel reads, without calling the layer
MAMBA_TYPES = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}


def last_part(name: str) -> str:
    return name.rpartition(".")[2]


def expert_names(hf_config: Any) -> set[str]:
    """Return the last parts of names that PEFT takes for experts in target_modules."""
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN, get_checkpoint_conversion_mapping

    model_type = hf_config.model_type
    conversion = {"mixtral": "mixtral"} | _MODEL_TO_CONVERSION_PATTERN
    if get_checkpoint_conversion_mapping(model_type) is None:
        return set()
    return EXPERT_NAMES.get(conversion.get(model_type), set())


def find_unloadable(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return the layers whose LoRA PEFT cannot load, with the reason."""
    names = list(names)
    keys, parents = saved_keys(model, [f"{PREFIX}{name}.lora_A.weight" for name in names]), _count_parents(model)
    reasons = {}
    for name in names:
        if model.config.model_type in MAMBA_TYPES and last_part(name) in BYPASSED:
            reasons[name] = f"PEFT refuses LoRA on {last_part(name)} of the model type {model.config.model_type}"
        elif f"{PREFIX}{name}.lora_A.weight" not in keys:
            reasons[name] = "PEFT renames its tensors when it loads them, to names that the model does not have"
        elif parents[model.get_submodule(name)] > 1:
            reasons[name] = "the model uses one layer in several places, and PEFT adapts only the first"
    return reasons


def _count_parents(model: nn.Module) -> dict[nn.Module, int]:
    """Return in how many modules each module is."""
    counts: dict[nn.Module, int] = {}
    for module in model.modules():
        for child in module.children():
            counts[child] = counts.get(child, 0) + 1
    return counts


def find_targets(
    hf_config: Any, module_names: Collection[str], names: Collection[str], modules_to_save: Collection[str]
) -> tuple[list[str] | str, list[str]] | None:
    """Return the target_modules and target_parameters with which PEFT adapts exactly these layers.

    Layers are named by the last parts of their names if these match no other module.

    Args:
        hf_config: The config of the transformers model.
        module_names: Names of all modules.
        names: Names of the layers.
        modules_to_save: Names of modules that are trained in full, which PEFT never adapts.

    Returns:
        The two options; None if no names or regular expression match these layers alone.
    """
    taken = expert_names(hf_config)
    parameters = sorted(f"{name}.weight" for name in names if last_part(name) in taken)
    layers = {name for name in names if last_part(name) not in taken}
    modules = [name for name in module_names if name and not _is_inside(name, modules_to_save)]
    weights = [f"{name}.weight" for name in module_names]
    if _matching(parameters, weights) != set(parameters):
        return None
    choices: list[list[str] | str] = [sorted(set(map(last_part, layers))), sorted(layers)]
    if not taken:  # PEFT would reduce an expression to the last parts of the names that it matches
        choices.append("|".join(map(re.escape, sorted(layers))))
    return next(((choice, parameters) for choice in choices if _matching(choice, modules) == layers), None)


def _matching(patterns: list[str] | str, names: Iterable[str]) -> set[str]:
    """Return the names that a list of names or a regular expression matches in PEFT."""
    if isinstance(patterns, str):
        return {name for name in names if re.fullmatch(patterns, name)}
    exact, suffixes = set(patterns), tuple(f".{pattern}" for pattern in patterns)
    return {name for name in names if name in exact or name.endswith(suffixes)}


def _is_inside(name: str, modules: Collection[str]) -> bool:
    return any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in modules)


def saved_keys(model: nn.Module, keys: Collection[str]) -> dict[str, str]:
    """Return the key to save for each key of LoRA, which PEFT renames to it; without those that have none.

    The key is as it is, or like that of the layer's weight in the files that transformers saves.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    if not _renames(model):
        return {key: key for key in keys}
    reverse = [
        entry.reverse_transform()
        for entry in reversed(get_model_conversion_mapping(model, add_legacy=False))
        if isinstance(entry, WeightRenaming)
    ]
    candidates = {}
    for key in keys:
        name, _, matrix = key.removeprefix(PREFIX).rpartition(".lora_")
        old = rename_source_key(f"{name}.weight", reverse, [], reverse=True)[0].removesuffix(".weight")
        candidates[key] = dict.fromkeys((key, f"{PREFIX}{old}.lora_{matrix}"))
    loaded = loaded_keys(model, [candidate for both in candidates.values() for candidate in both])
    chosen = {key: [one for one in both if loaded[one] == key] for key, both in candidates.items()}
    return {key: both[0] for key, both in chosen.items() if both}


def loaded_keys(model: nn.Module, keys: Collection[str]) -> dict[str, str]:
    """Return the key to which PEFT renames each key of an adapter's file."""
    if not _renames(model):
        return {key: key for key in keys}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    strip = [WeightRenaming(f"{PREFIX}model.", "model."), WeightRenaming(PREFIX, "")]
    insert = WeightRenaming(r"(lora_[^\.]*)", r"\1.default")  # the name of the adapter
    renamings = [*strip, insert, *(entry for entry in mapping if isinstance(entry, WeightRenaming))]
    experts = [pattern for entry in mapping if isinstance(entry, WeightConverter) for pattern in _experts(entry)]
    loaded = {}
    for key in sorted(keys, key=dot_natural_key):
        renamed = "".join(rename_source_key(key, renamings, [])[0].rsplit(".default", 1))
        is_kept = ".lora_" not in key or key.endswith(renamed)
        loaded[key] = key if is_kept else f"{PREFIX}{renamed.removeprefix(PREFIX)}"
        if any(pattern.search(renamed) for pattern in experts):
            loaded[key] = ""  # becomes a slice of another tensor
    return loaded


def _renames(model: nn.Module) -> bool:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    return get_checkpoint_conversion_mapping(model.config.model_type) is not None


def _experts(converter: Any) -> list[re.Pattern]:
    """Return the expressions for keys of LoRA on separate experts, which PEFT stacks."""
    if len(converter.target_patterns) > 1 or not converter.target_patterns[0].endswith(("gate_up_proj", "down_proj")):
        return []
    parts = [pattern.rpartition(".")[0].replace("*.", r".*\.") for pattern in converter.source_patterns]
    return [re.compile(rf"{part}\.lora_[AB]\.") for part in parts]
