"""Which layers of a model have a LoRA, and which of the model's parameters are trained with it."""

import difflib
import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from . import lora
from .policy import find_blocks
from .quantize import is_quantized
from .weights import Weights


@dataclass
class Adapter:
    """A LoRA in a model: what its adapter_config.json says, and which parameters of the model are its own."""

    config: dict[str, Any]
    adapted: dict[str, nn.Module]  # layers by name
    taken: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # A and B that were taken out of the base
    saved: list[str] = field(default_factory=list)  # modules that are trained and saved whole

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The model's parameters that are trained."""
        found = dict(model.named_parameters())
        bias = self.config["bias"]
        biases = {f"{name}.bias" for name in self.adapted} if bias == "lora_only" else set()
        wanted = {}
        for name, parameter in found.items():
            module, _, last = name.rpartition(".")
            whole = any(module == path or module.startswith(f"{path}.") for path in self.saved)
            if last in lora.MATRICES or whole or name in biases or (bias == "all" and last == "bias"):
                wanted[name] = parameter
        return wanted

    def freeze(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Trains the adapter, in float32; everything else is frozen, and in `dtype` unless it is quantised."""
        trained = {id(parameter) for parameter in self.parameters(model).values()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
            if not is_quantized(parameter):
                parameter.data = parameter.data.to(torch.float32 if id(parameter) in trained else dtype)

    def names(self, model: nn.Module) -> list[str]:
        """The model's tensors that are saved: those that are trained, and embeddings with rows of their own."""
        layers = filter(None, (model.get_input_embeddings(), model.get_output_embeddings()))
        grown = {id(layer.weight) for layer in layers}
        more = [name for name, p in model.named_parameters() if model.has_new_tokens and id(p) in grown]
        return list(dict.fromkeys([*self.parameters(model), *more]))


# --------------------------------------------------------------------------------------------------- where it goes


def inject(model: nn.Module, config: dict[str, Any], weights: Weights | None = None) -> Adapter:
    """Gives every layer that the config names its matrices, still zero. Raises ConfigError."""
    modules = dict(model.named_modules())
    saved = []
    for wanted in config.get("modules_to_save") or []:
        found = [name for name in modules if name == wanted or name.endswith(f".{wanted}")]
        if not found:
            raise ConfigError(f"lora.modules_to_save: {_no_such(wanted, modules)}")
        saved += found
    adapted = {name: modules[name] for name in _targets(model, modules, config, saved)}
    for name, module in adapted.items():
        rank = _pattern(config.get("rank_pattern"), name, config["r"])
        alpha = _pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        dropout, dora = config.get("lora_dropout", 0.0), bool(config.get("use_dora"))
        lora.adapt(module, lora.Settings(rank, scaling, 0.0 if isinstance(module, nn.Embedding) else dropout, dora))
    adapter = Adapter(config, adapted, saved=list(dict.fromkeys(saved)))
    _untie(model, adapter.saved, weights)
    return adapter


def _targets(model: nn.Module, modules: dict[str, nn.Module], config: dict[str, Any], saved: list[str]) -> list[str]:
    """Names of the layers to adapt, in the model's order; none in the modules that are trained whole."""
    wanted, excluded = config["target_modules"], config.get("exclude_modules")
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    head, whole = model.get_output_embeddings(), {part for name in saved for part in modules[name].modules()}
    names = []
    for name, module in modules.items():
        if not lora.is_adaptable(module) or module in whole or (excluded and _matches(excluded, name)):
            continue
        if wanted == "all-linear":
            chosen = not isinstance(module, nn.Embedding) and module is not head
        else:
            chosen = _matches(wanted, name)
        if chosen:
            names.append(name)
    missing = [one for one in wanted if not any(_matches([one], name) for name in names)] if _is_list(wanted) else []
    if missing or not names:
        told = missing[0] if missing else wanted
        there = {name: module for name, module in modules.items() if lora.is_adaptable(module)}
        raise ConfigError(f"lora.target_modules: {_no_such(told, there)}")
    if layers:
        names = _of_layers(model, modules, names, layers)
    return names


def _of_layers(model: nn.Module, modules: dict[str, nn.Module], names: list[str], layers: list[int]) -> list[str]:
    """Those of the names that lie in the blocks with these numbers."""
    blocks = find_blocks(model.base_model)
    path = next(name for name, module in modules.items() if module is blocks)
    outside = [number for number in layers if not 0 <= number < len(blocks)]
    if outside:
        raise ConfigError(f"lora.layers_to_transform: {outside[0]} is outside of the blocks 0-{len(blocks) - 1}.")
    return [name for name in names if any(name.startswith(f"{path}.{number}.") for number in layers)]


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, set))


def _matches(wanted: Any, name: str) -> bool:
    """A name or the end of one in a list, or a regular expression of the whole name; as PEFT reads them."""
    if _is_list(wanted):
        return any(name == one or name.endswith(f".{one}") for one in wanted)
    try:
        return re.fullmatch(wanted, name) is not None or name == wanted or name.endswith(f".{wanted}")
    except re.error as error:
        raise ConfigError(f"lora.target_modules: {wanted!r} is no regular expression: {error}.") from None


def _no_such(wanted: str, modules: dict[str, nn.Module]) -> str:
    there = sorted({name.rpartition(".")[2] for name in modules if name and not name.rpartition(".")[2].isdigit()})
    near = difflib.get_close_matches(wanted.rpartition(".")[2], there, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"nothing in the model is called {wanted!r}.{hint} There are {', '.join(there)}."


def _pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _untie(model: nn.Module, saved: list[str], weights: Weights | None) -> None:
    """A module that is trained whole must not change another one that has the same weight, as with PEFT."""
    owners: dict[int, str] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        owner = owners.setdefault(id(parameter), name)
        if owner == name or not any(one.startswith(f"{path}.") for path in saved for one in (name, owner)):
            continue
        module, _, last = name.rpartition(".")
        setattr(model.get_submodule(module), last, nn.Parameter(parameter.detach().clone()))
        model.config.get_text_config().tie_word_embeddings = False
        if weights is not None:
            weights.alias(name, owner)
