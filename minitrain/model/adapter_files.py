"""Load and save adapters in PEFT's format, and initialize new ones."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minitrain.config.schema import Config
from minitrain.config.sections import SoftPromptConfig
from minitrain.errors import ConfigError
from minitrain.io.tensor_files import save_file

from . import experts, lora, token_rows
from .adapter import Adapter, init_rows, inject, new_biases, parse_token_indices, train_new_rows
from .adapter_config import CONFIG_FILE, FILE, base_config, new_config, read_config
from .adapter_names import check_loadable, peft_name, target_options
from .multimodal import split_adapter
from .peft_rules import PREFIX, loaded_keys, saved_keys
from .sequence_head import heads_of, is_encoder
from .soft_prompt import PEFT_TYPES, TENSOR, PromptAdapter, SoftPrompt, prompt_config, vectors_of
from .vocabulary import count_ids
from .weights import LowRankDifference, Weights

PROMPT_PREFIX = "base_model."  # of keys in PEFT's files with a soft prompt


def adapt_model(config: Config, model: nn.Module, tokenizer, weights: Weights | None) -> Adapter:
    """Add the adapter of a config to a model.

    Args:
        config: The full config.
        model: The transformers model.
        tokenizer: Tokenizes the initial text of a soft prompt.
        weights: Weights of a model on the meta device; those of the adapter are added.

    Raises:
        ConfigError: The adapter does not match the model.
    """
    if config.model.adapter:
        adapter = load_adapter(model, Path(config.model.adapter), weights)
        if not isinstance(adapter, PromptAdapter):
            check_loadable(model, adapter, "model.adapter", "Merge it, and train the merged model")
        return adapter
    if config.soft_prompt.num_virtual_tokens:
        return _new_prompt(config, model, tokenizer, weights)
    adapter = inject(model, new_config(config, model), weights)
    check_loadable(model, adapter, "lora.target_modules", "Add it to lora.exclude_modules")
    for name, module in adapter.layers.items():
        _init_lora(adapter, name, module, config, weights)
    for name, module in adapter.experts.items():
        _init_experts(name, module, config, weights)
    return adapter


def load_adapter(model: nn.Module, folder: Path, weights: Weights | None = None) -> Adapter:
    """Add the adapter in a folder to a model. Raises ConfigError if they do not match."""
    config = read_config(folder)
    try:
        tensors = load_file(folder / FILE)
    except Exception as error:
        raise ConfigError(f"{folder / FILE}: cannot be read: {error}", "unreadable") from None
    config, tensors, other_tensors = split_adapter(model, config, tensors, PREFIX)
    config = _resolve_modules(config, model, folder)
    if problem_type := config.get("minitrain_problem_type"):
        model.config.problem_type = problem_type
    if config["peft_type"] != "LORA":
        return _load_prompt(model, config, tensors, folder, weights)
    try:
        adapter = inject(model, config, weights, strict=False)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG_FILE}: {error.message.removeprefix('lora.')}", error.code) from None
    adapter.other_tensors = other_tensors
    named = _rename_keys(model, adapter, tensors, folder)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owners = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = adapter.parameters(model)
    for name, tensor in named.items():
        if not name.endswith(token_rows.NAME):
            _load_tensor(folder, name, parameters[name], tensor, weights)
    frozen = {owners[id(parameters[name])] for name in named} - trained.keys()
    adapter.extra_tensors = list(dict.fromkeys([*adapter.extra_tensors, *sorted(frozen)]))
    for name in (name for name in trained if name.endswith(f".{token_rows.NAME}")):
        module = name.removesuffix(f".{token_rows.NAME}")
        init_rows(model, module, parameters[name], weights)  # the adapter file can have the weight
        if name in named:
            ids = parse_token_indices(model, config.get("trainable_token_indices"))[module]
            _load_rows(folder, name, model.get_submodule(module), ids, named[name], weights)
    return adapter


def _rename_keys(model: nn.Module, adapter: Adapter, tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file by parameter name. Raises ConfigError if keys do not match."""
    names = {peft_name(name, adapter): name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, module in model.named_modules():  # PEFT's key of resized embeddings
        if token_rows.has_rows(module):
            names[f"{PREFIX}{name}.token_adapter.base_layer.weight"] = f"{name}.weight"
    loaded = loaded_keys(model, [key for key in tensors if key not in names])
    tensors = {loaded.get(key, key): tensor for key, tensor in tensors.items()}
    token_indices = parse_token_indices(model, adapter.config.get("trainable_token_indices"))
    missing = []
    for name in adapter.parameters(model):
        module, _, last = name.rpartition(".")
        if peft_name(name, adapter) not in tensors and (last != token_rows.NAME or module in token_indices):
            missing.append(peft_name(name, adapter))
    unknown = [key for key in tensors if key not in names]
    if missing or unknown:
        base = adapter.config.get("base_model_name_or_path")
        reason = f"missing {missing[:3]}, unexpected {unknown[:3]}. Use its base model, {base}"
        raise ConfigError(f"{folder}: tensors do not match the model: {reason}.", "mismatch")
    return {names[key]: tensor for key, tensor in tensors.items()}


def _load_tensor(folder: Path, name: str, parameter: nn.Parameter, tensor: Tensor, weights: Weights | None) -> None:
    if parameter.shape != tensor.shape:
        raise ConfigError(
            f"{folder}: {name} must have the shape {list(parameter.shape)}, got {list(tensor.shape)}.", "mismatch"
        )
    _set(name, parameter, tensor, weights)


def _load_rows(
    folder: Path, name: str, module: nn.Module, ids: list[int], tensor: Tensor, weights: Weights | None
) -> None:
    """Load the trained rows of tokens `ids`; the layer can also have rows of new tokens."""
    if list(tensor.shape) != [len(ids), module.weight.shape[1]]:
        raise ConfigError(
            f"{folder}: {name} must have the shape {[len(ids), module.weight.shape[1]]}, got {list(tensor.shape)}.",
            "mismatch",
        )
    rows = module.token_rows.detach() if weights is None else weights.sources[name]
    indices = torch.searchsorted(module.token_ids.cpu(), torch.tensor(ids))
    rows[indices.to(rows.device)] = tensor.to(rows)


def _resolve_modules(config: dict[str, Any], model: nn.Module, folder: Path) -> dict[str, Any]:
    """Return an adapter_config.json with full names in `modules_to_save`; PEFT matches the ends of names.

    Raises:
        ConfigError: The adapter is from a model with another head.
    """
    is_classifier, heads = config.get("task_type") == "SEQ_CLS", heads_of(model)
    saved_labels, labels = config.get("minitrain_outputs"), list(model.config.id2label.values())
    if is_classifier != bool(heads.trained) or (saved_labels and saved_labels != labels):
        expected = f"labels {', '.join(saved_labels or ['unknown'])}" if is_classifier else "an LM head"
        got = f"labels {', '.join(labels)}" if heads.trained else "an LM head"
        raise ConfigError(f"{folder}: the adapter needs a model with {expected}, got one with {got}.", "mismatch")
    suffixes = [*(config.get("modules_to_save") or []), *(("classifier", "score") if is_classifier else ())]
    paths = [name for name, _ in model.named_modules() if any(name.endswith(suffix) for suffix in suffixes)]
    if missing := [name for name in heads.new if not any(f"{name}.".startswith(f"{path}.") for path in paths)]:
        raise ConfigError(f"{folder}: {missing[0]} is missing in the adapter and in its base model.", "mismatch")
    return config | {"modules_to_save": paths or None}


def save_adapter(model: nn.Module, adapter: Adapter, tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Save an adapter in the format of `peft.PeftModel.from_pretrained`.

    Args:
        model: The transformers model.
        adapter: Its adapter.
        tensors: Name and unsharded value of each tensor of the adapter.
        folder: Folder for the files.
    """
    by_name = {name: tensor.to("cpu").contiguous() for name, tensor in tensors}
    if isinstance(adapter, PromptAdapter):
        heads = tuple(f"{name}." for name in adapter.modules_to_save)
        prefixes = (*heads, *adapter.extra_tensors)
        peft_tensors = {
            f"{PROMPT_PREFIX}{name}": tensor for name, tensor in by_name.items() if name.startswith(prefixes)
        }
        _write(folder, peft_tensors | {TENSOR: vectors_of(by_name)}, adapter.config)
        return
    by_name |= {name: by_name[owner].clone() for name, owner in _tied_names(model, adapter).items()}
    peft_tensors = {peft_name(name, adapter): tensor for name, tensor in by_name.items()} | adapter.other_tensors
    config = adapter.config | target_options(model, adapter)
    config["modules_to_save"] = adapter.modules_to_save or None  # full names: PEFT matches the ends of names
    config["trainable_token_indices"] = _saved_rows(model, adapter) or None
    config["fan_in_fan_out"] = any(lora.is_transposed(m) and not isinstance(m, nn.Embedding) for m in model.modules())
    if adapter.subtracted_init:
        _restore_base(adapter, peft_tensors, config)
    keys = saved_keys(model, [key for key in peft_tensors if ".lora_" in key])
    _write(folder, {keys.get(key, key): tensor for key, tensor in peft_tensors.items()}, config)


def _tied_names(model: nn.Module, adapter: Adapter) -> dict[str, str]:
    """Map tied names of modules that are trained in full to their saved name; PEFT needs a tensor for each."""
    owners = {id(parameter): name for name, parameter in model.named_parameters()}
    named = model.named_parameters(remove_duplicate=False)
    owned = {name: owners[id(parameter)] for name, parameter in named if name != owners[id(parameter)]}
    return {
        name: owner
        for name, owner in owned.items()
        if any(name.startswith(f"{path}.") for path in adapter.modules_to_save)
    }


def _saved_rows(model: nn.Module, adapter: Adapter) -> dict[str, list[int]]:
    """Return the token ids whose trained rows are saved, by layer."""
    modules = [name.rpartition(".")[0] for name in adapter.names(model) if name.endswith(f".{token_rows.NAME}")]
    return {name: model.get_submodule(name).token_ids.tolist() for name in modules}


def _write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"inference_mode": True}, indent=2) + "\n")


def _new_prompt(config: Config, model: nn.Module, tokenizer, weights: Weights | None) -> PromptAdapter:
    _check_is_decoder(model)
    options, embeddings = config.soft_prompt, model.get_input_embeddings()
    model.soft_prompt = SoftPrompt(model, options, config.seed)
    if options.method == "prompt":
        if options.init_text:
            ids = tokenizer(options.init_text, add_special_tokens=False)["input_ids"]
            ids = (ids * (options.num_virtual_tokens // max(1, len(ids)) + 1))[: options.num_virtual_tokens]
        else:  # random tokens are better than noise (section 3.2 of Lester et al.)
            generator = torch.Generator().manual_seed(config.seed)
            ids = torch.randint(count_ids(tokenizer), (options.num_virtual_tokens,), generator=generator).tolist()
        name = next(name for name, p in model.named_parameters() if p is embeddings.weight)
        rows = [embeddings.weight[i] if weights is None else weights.rows(name, i, i + 1)[0] for i in ids]
        with torch.no_grad():
            model.soft_prompt.weight.copy_(torch.stack(rows))
    return _make_prompt_adapter(model, prompt_config(options, model, base_config(config, model)), weights)


def _prompt_options(config: dict[str, Any]) -> SoftPromptConfig:
    """Return the options of a saved soft prompt."""
    method = next(name for name, peft_type in PEFT_TYPES.items() if peft_type == config["peft_type"])
    return SoftPromptConfig(num_virtual_tokens=config["num_virtual_tokens"], method=method)


def _load_prompt(
    model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path, weights: Weights | None
) -> PromptAdapter:
    _check_is_decoder(model)
    vectors = tensors.get(TENSOR)
    model.soft_prompt = SoftPrompt(model, _prompt_options(config), 0)
    expected = model.soft_prompt.weight.shape
    if vectors is None or vectors.shape != expected:
        shape = "missing" if vectors is None else list(vectors.shape)
        raise ConfigError(f"{folder}: {TENSOR} must have the shape {list(expected)}, got {shape}.", "mismatch")
    with torch.no_grad():
        model.soft_prompt.weight.copy_(vectors)
    adapter = _make_prompt_adapter(model, config, weights)
    parameters = dict(model.named_parameters())
    full_names = [
        n for n in adapter.parameters(model) if not n.startswith("soft_prompt.") and not n.endswith(token_rows.NAME)
    ]
    if missing := [name for name in full_names if f"{PROMPT_PREFIX}{name}" not in tensors]:
        raise ConfigError(f"{folder}: tensors do not match the model: missing {missing[:3]}.", "mismatch")
    for key in tensors.keys() - {TENSOR}:
        name = key.removeprefix(PROMPT_PREFIX)
        if name not in parameters:
            raise ConfigError(f"{folder}: tensors do not match the model: unexpected {key}.", "mismatch")
        _load_tensor(folder, name, parameters[name], tensors[key], weights)
    frozen = sorted({key.removeprefix(PROMPT_PREFIX) for key in tensors.keys() - {TENSOR}} - set(full_names))
    adapter.extra_tensors = list(dict.fromkeys([*adapter.extra_tensors, *frozen]))
    for name, parameter in adapter.parameters(model).items():
        if name.endswith(f".{token_rows.NAME}"):
            init_rows(model, name.removesuffix(f".{token_rows.NAME}"), parameter, weights)
    return adapter


def _check_is_decoder(model: nn.Module) -> None:
    if is_encoder(model):
        reason = f"{type(model).__name__} is an encoder, whose head reads the first position. Use lora"
        raise ConfigError(f"soft_prompt: {reason}.", "conflict")


def _make_prompt_adapter(model: nn.Module, config: dict[str, Any], weights: Weights | None) -> PromptAdapter:
    adapter = PromptAdapter(config, {}, modules_to_save=heads_of(model).trained)
    if weights is not None:
        weights.replace({name: p.detach() for name, p in adapter.parameters(model).items()})
    adapter.extra_tensors = train_new_rows(model, None, adapter.modules_to_save, weights) + new_biases(model, adapter)
    return adapter


def _init_lora(adapter: Adapter, name: str, module: nn.Module, config: Config, weights: Weights | None) -> None:
    """Initialize the LoRA matrices of one layer, unless the model has no weights."""
    if module.weight.is_meta and weights is None:
        return
    key = f"{name}.weight"

    def weight() -> Tensor:
        if weights is None:
            return lora.dense_weight(module).detach().float()
        full = weights.rows(key, 0, module.weight.shape[0]).float()
        return full.T if lora.is_transposed(module) else full

    method = config.lora.init
    a, b = lora.initial_values(method, weight, module, name, config.seed)
    if config.lora.use_dora:
        norms = weight().norm(dim=1)  # [out]
        if not norms.all():
            raise ConfigError(
                f"lora.use_dora: row {int(norms.argmin())} of {name} is all zeros, so it has no direction. "
                f"Add {name} to lora.exclude_modules, or set use_dora=false.",
                "conflict",
            )
        _set(f"{name}.lora_magnitude_vector", module.lora_magnitude_vector, norms, weights)
    matrix_names = (
        ("lora_embedding_A", "lora_embedding_B") if isinstance(module, nn.Embedding) else ("lora_A", "lora_B")
    )
    for matrix, parameter, value in zip(matrix_names, lora.matrices(module), (a, b), strict=True):
        _set(f"{name}.{matrix}", parameter, value, weights)
    if method in ("pissa", "olora") and not isinstance(module, nn.Embedding):
        adapter.subtracted_init[name] = (a, b)
        update = module.lora.scaling * b  # [out, r]
        left, right = (a.T, update.T) if lora.is_transposed(module) else (update, a)
        if weights is not None:
            weights.sources[key] = LowRankDifference(weights.sources[key], left, right)
        else:
            with torch.no_grad():
                module.weight.copy_(module.weight.float() - (left @ right).to(module.weight.device))


def _init_experts(name: str, module: nn.Module, config: Config, weights: Weights | None) -> None:
    """Initialize the LoRA matrices of a parameter, unless the model has no weights; B stays zero."""
    path, _, last = name.rpartition(".")
    for suffix in (experts.A, experts.B):
        parameter = module.get_parameter(f"{last}{suffix}")
        if parameter.is_meta and weights is None:
            return
        value = torch.zeros(parameter.shape)
        if suffix == experts.A:
            value = experts.initial_a(module, last, config.lora.init, lora.seeded_generator(config.seed, name))
        _set(f"{path}.{last}{suffix}", parameter, value, weights)


def _set(name: str, parameter: nn.Parameter, value: Tensor, weights: Weights | None) -> None:
    if weights is not None:
        weights.replace({name: value})
    else:
        with torch.no_grad():
            parameter.copy_(value)


def _restore_base(adapter: Adapter, peft_tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Convert to a LoRA of twice the rank on the original base model: BA - B0 A0 = [B, -B0] [A; A0]."""
    for name, (a, b) in adapter.subtracted_init.items():
        key_a, key_b = f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"
        peft_tensors[key_a] = torch.cat([peft_tensors[key_a], a])
        peft_tensors[key_b] = torch.cat([peft_tensors[key_b], -b], 1)
    others = [name for name in adapter.layers if name not in adapter.subtracted_init]  # embeddings keep their rank
    config["rank_pattern"] = dict.fromkeys(map(re.escape, others), config["r"])
    config["alpha_pattern"] = dict.fromkeys(map(re.escape, others), config["lora_alpha"])
    config["r"] *= 2
    config["lora_alpha"] *= math.sqrt(2) if config["use_rslora"] else 2
