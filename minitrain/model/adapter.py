"""Add LoRA to the target layers of an adapter, and select the parameters to train."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from minitrain.errors import ConfigError

from . import experts, lora, token_rows
from .adapter_targets import DROPOUT, layer_weights, rank_and_alpha, target_layers, target_parameters, unknown_module
from .dtypes import DtypePlan
from .packed import is_quantized
from .vocabulary import embedding_layers, embedding_parameters
from .weights import Weights


@dataclass
class Adapter:
    """The LoRA of a model.

    Attributes:
        config: Its adapter_config.json.
        layers: Layers with LoRA by name.
        experts: Modules with LoRA on a parameter, by name of the parameter.
        subtracted_init: Initial A and B by layer, whose product was subtracted from the base weight (pissa, olora).
        modules_to_save: Names of modules that are trained and saved in full.
        extra_tensors: Names of frozen tensors that are saved with the adapter.
        other_tensors: Tensors in its file for modules of a multimodal model that are not loaded, by key.
    """

    config: dict[str, Any]
    layers: dict[str, nn.Module]
    experts: dict[str, nn.Module] = field(default_factory=dict)
    subtracted_init: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    modules_to_save: list[str] = field(default_factory=list)
    extra_tensors: list[str] = field(default_factory=list)
    other_tensors: dict[str, Tensor] = field(default_factory=dict)

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name."""
        parameters = dict(model.named_parameters())
        bias = self.config["bias"]
        biases = {f"{name}.bias" for name in self.layers} if bias == "lora_only" else set()
        trained = {}
        for name, parameter in parameters.items():
            last = name.rpartition(".")[2]
            in_saved_module = any(name.startswith(f"{path}.") for path in self.modules_to_save)
            if (
                last in (*lora.MATRICES, token_rows.NAME)
                or experts.is_matrix_name(last)
                or in_saved_module
                or name in biases
                or (bias == "all" and last == "bias")
            ):
                trained[name] = parameter
        return trained

    def freeze(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Freeze all but the adapter, which is kept in float32, the rest in `dtype` unless it is quantized."""
        trained, plan = {id(parameter) for parameter in self.parameters(model).values()}, DtypePlan(model, dtype)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(id(parameter) in trained)
            if not is_quantized(parameter):
                is_trained = id(parameter) in trained
                parameter.data = parameter.data.to(torch.float32 if is_trained else plan(name, parameter))

    def names(self, model: nn.Module) -> list[str]:
        """Return the names of the tensors to save, without trained rows of weights that are saved in full."""
        covered = {name.removesuffix("weight") + token_rows.NAME for name in self.extra_tensors}
        return [*(name for name in self.parameters(model) if name not in covered), *self.extra_tensors]


# --------------------------------------------------------------------------------------------------- where it goes


def inject(model: nn.Module, config: dict[str, Any], weights: Weights | None = None, strict: bool = True) -> Adapter:
    """Add LoRA matrices of zeros to the target layers of an adapter_config.json.

    Args:
        model: The transformers model.
        config: The adapter_config.json.
        weights: Weights of a model on the meta device.
        strict: Require every name in target_modules and exclude_modules to match a layer; PEFT only requires one match.

    Raises:
        ConfigError: A name matches no module, or options conflict.
    """
    modules = dict(model.named_modules())
    modules_to_save = []
    for path in config.get("modules_to_save") or []:
        matches = [name for name in modules if name == path or name.endswith(f".{path}")]
        if not matches:
            raise ConfigError(f"lora.modules_to_save: {unknown_module(path, modules)}", "not-a-choice")
        modules_to_save += matches
    adapter = Adapter(config, {}, modules_to_save=list(dict.fromkeys(modules_to_save)))
    keep_tied = bool(config.get("ensure_weight_tying"))
    if keep_tied:
        adapter.modules_to_save = _add_tied(model, adapter.modules_to_save)
    untied = _untie(model, adapter.modules_to_save, weights, keep_tied)
    rows = train_new_rows(model, config.get("trainable_token_indices"), adapter.modules_to_save, weights)
    adapter.experts = target_parameters(model, modules, config, adapter.modules_to_save, strict)
    if config["target_modules"] or layer_weights(config, modules) or not adapter.experts:
        names = target_layers(model, modules, config, adapter.modules_to_save, strict)
        adapter.layers |= {name: modules[name] for name in names}
    if keep_tied and (tied := _add_tied(model, adapter.layers)[len(adapter.layers) :]):
        raise ConfigError(
            f"ensure_weight_tying: LoRA on a layer that is tied to {tied[0]} is not supported. Train it in full "
            "(modules_to_save), or create the adapter without ensure_weight_tying.",
            "unsupported-model",
        )
    adapter.extra_tensors += [name for name in rows if untied or not _is_storable(model, name, adapter)]
    adapter.extra_tensors += new_biases(model, adapter)
    for name, module in adapter.layers.items():
        settings = _settings(config, name)
        dropout = config.get(DROPOUT, config.get("lora_dropout", 0.0))
        settings.dropout = 0.0 if isinstance(module, nn.Embedding) else dropout
        settings.dora = bool(config.get("use_dora"))
        lora.adapt(module, settings)
    for name, module in adapter.experts.items():
        experts.adapt_parameter(module, name.rpartition(".")[2], _settings(config, name))
    return adapter


def _settings(config: dict[str, Any], name: str) -> lora.LoRASettings:
    """Return rank and scaling of a layer or a parameter."""
    rank, alpha = rank_and_alpha(config, name)
    return lora.LoRASettings(rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _is_storable(model: nn.Module, weight: str, adapter: Adapter) -> bool:
    """Return whether PEFT can store trained rows of a weight: only without LoRA on it, and in layers without bias."""
    layers = [module for module in model.modules() if getattr(module, "weight", None) is model.get_parameter(weight)]
    with_lora = [module for module in adapter.layers.values() if any(module is layer for layer in layers)]
    return not with_lora and all(getattr(module, "bias", None) is None for module in layers)


def new_biases(model: nn.Module, adapter: Adapter) -> list[str]:
    """Return the names of frozen biases that are larger than in the base model because of new tokens."""
    trained = adapter.parameters(model)
    biases = [name for name, parameter in embedding_parameters(model).items() if parameter.ndim == 1]
    return [name for name in biases if model.new_ids and name not in trained]


def train_new_rows(model: nn.Module, token_indices: Any, full_modules: list[str], weights: Weights | None) -> list[str]:
    """Add trained rows to frozen embeddings, for new tokens and those in `token_indices`.

    The initial rows are those of the weight. Tied layers share them.

    Args:
        model: The transformers model.
        token_indices: PEFT's trainable_token_indices: token ids of the input embeddings, or by layer name.
        full_modules: Names of modules that are trained in full.
        weights: Weights of a model on the meta device.

    Returns:
        The names of the weights with trained rows.

    Raises:
        ConfigError: `token_indices` names a layer without rows, trained in full, or tied to one with other rows.
    """
    layers = embedding_layers(model)
    chosen = parse_token_indices(model, token_indices)
    first_layers: dict[int, str] = {}  # id of a weight -> its first layer
    for name, layer in layers.items():
        if any(f"{name}.".startswith(f"{path}.") for path in full_modules):
            if name in chosen:
                raise ConfigError(
                    f"trainable_token_indices: {name} is also in modules_to_save. Remove it from one of them.",
                    "conflict",
                )
            continue
        owner = first_layers.setdefault(id(layer.weight), name)
        if chosen.get(name, chosen.get(owner)) != chosen.get(owner):
            raise ConfigError(
                f"trainable_token_indices: {name} and {owner} are tied. Give them the same token ids.", "mismatch"
            )
        ids = sorted({*chosen.get(owner, ()), *model.new_ids})
        if ids:
            rows = token_rows.add(layer, ids, None if owner == name else layers[owner].token_rows)
            if owner == name:
                init_rows(model, name, rows, weights)
    return [f"{name}.weight" for name in first_layers.values() if token_rows.has_rows(layers[name])]


def init_rows(model: nn.Module, name: str, rows: nn.Parameter, weights: Weights | None) -> None:
    """Initialize the trained rows of a layer with those of its weight."""
    layer = model.get_submodule(name)
    if weights is None:
        with torch.no_grad():
            rows.copy_(layer.weight[layer.token_ids.to(layer.weight.device)])
        return
    initial = [weights.rows(f"{name}.weight", number, number + 1) for number in layer.token_ids.tolist()]
    weights.replace({f"{name}.{token_rows.NAME}": torch.cat(initial).float()})


def parse_token_indices(model: nn.Module, token_indices: Any) -> dict[str, list[int]]:
    """Return PEFT's trainable_token_indices by full layer name. Raises ConfigError if they are invalid."""
    if token_indices is None:
        return {}
    key, parsed, layers = "trainable_token_indices", {}, embedding_layers(model)
    if isinstance(token_indices, list):
        token_indices = {
            next(name for name, layer in layers.items() if layer is model.get_input_embeddings()): token_indices
        }
    if not isinstance(token_indices, dict):
        raise ConfigError(
            f"{key}: expected a list of token ids, or lists by layer name, got {token_indices!r}.", "wrong-type"
        )
    for suffix, ids in token_indices.items():
        names = [name for name in layers if name.endswith(suffix)]
        if not names:
            raise ConfigError(
                f"{key}: no embedding or LM head is named {suffix!r}. Choose from {', '.join(layers)}.", "not-a-choice"
            )
        n_rows = layers[names[0]].weight.shape[0]
        is_id_list = isinstance(ids, list) and all(type(number) is int for number in ids)
        if not is_id_list or len(set(ids)) < len(ids) or not all(0 <= number < n_rows for number in ids):
            raise ConfigError(
                f"{key}: {suffix} needs distinct token ids from 0 to {n_rows - 1}, got {str(ids)[:100]}.",
                "out-of-range",
            )
        parsed |= dict.fromkeys(names, ids)
    return parsed


def _add_tied(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the names, followed by those of other modules with the same weight."""
    parameter_ids = {id(parameter) for name in names for parameter in model.get_submodule(name).parameters()}
    tied = [name for name, module in model.named_modules() if id(module._parameters.get("weight")) in parameter_ids]
    return list(dict.fromkeys([*names, *tied]))


def _untie(model: nn.Module, modules_to_save: list[str], weights: Weights | None, keep_tied: bool) -> bool:
    """Untie modules that are trained in full, as PEFT does, so that they do not change other modules.

    Args:
        model: The transformers model.
        modules_to_save: Names of modules that are trained in full.
        weights: Weights of a model on the meta device.
        keep_tied: Keep modules tied if both are trained in full.

    Returns:
        Whether a weight was untied.
    """
    owners: dict[int, str] = {}
    untied = False
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        owner = owners.setdefault(id(parameter), name)
        is_inside = [any(one.startswith(f"{path}.") for path in modules_to_save) for one in (name, owner)]
        if owner == name or not any(is_inside) or (all(is_inside) and keep_tied):
            continue
        module, _, last = name.rpartition(".")
        setattr(model.get_submodule(module), last, nn.Parameter(parameter.detach().clone()))
        model.config.get_text_config().tie_word_embeddings = False
        untied = True
        if weights is not None:
            weights.alias(name, owner)
    return untied
