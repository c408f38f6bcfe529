"""Adapters as files, in PEFT's format both ways, and the values that a new one starts from."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import ConfigError
from ..schema import Config, SoftPromptConfig
from ..tensor_files import save_file
from . import lora
from .adapter import Adapter, inject
from .scoring import heads_of, is_encoder
from .soft_prompt import KINDS, TENSOR, PromptAdapter, SoftPrompt, prompt_config, vectors_of
from .weights import Less, Weights

PREFIX, PROMPT_PREFIX = "base_model.model.", "base_model."  # of names in PEFT's files; of a head beside a soft prompt
HEADS = ("score.weight", ".classifier.weight", "classifier.out_proj.weight")  # the last layer of a scalar head
FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
# What cannot be guessed, and its types.
REQUIRED = {
    "LORA": {"r": int, "lora_alpha": (int, float), "target_modules": (str, list)},
    "PROMPT": {"num_virtual_tokens": int},
}
# What PEFT can do and this does not: refused when an adapter uses it.
FOREIGN = (
    *("layer_replication", "lora_bias", "trainable_token_indices", "target_parameters", "use_qalora"),
    *("alora_invocation_tokens", "megatron_config", "arrow_config", "use_bdlora", "velora_config", "monteclora_config"),
)


def has_adapter(config: Config) -> bool:
    return bool(config.lora.rank or config.soft_prompt.num_virtual_tokens or config.model.adapter)


def adapt_model(config: Config, model: nn.Module, tokenizer, weights: Weights | None) -> Adapter:
    """Puts the adapter that a config asks for into a model. Raises ConfigError.

    `weights` are those of a model that was built empty: they get the rows of the adapter, too.
    """
    if config.model.adapter:
        return load_adapter(model, Path(config.model.adapter), weights)
    if config.soft_prompt.num_virtual_tokens:
        return _new_prompt(config, model, tokenizer, weights)
    adapter = inject(model, _new_config(config, model), weights)
    for name, module in adapter.adapted.items():
        _start(adapter, name, module, config, weights)
    return adapter


def outline_adapter(config: Config, model: nn.Module) -> Adapter:
    """The adapter that `adapt_model` makes, without values, in a model on the meta device. Raises ConfigError."""
    if config.model.adapter:
        return load_adapter(model, Path(config.model.adapter))  # what it sets has no values here, but has to fit
    if config.soft_prompt.num_virtual_tokens:
        _refuse_encoder(model)
        model.soft_prompt = SoftPrompt(model, config.soft_prompt, 0)
        return PromptAdapter({}, {}, saved=heads_of(model).trained)
    return inject(model, _new_config(config, model))


def load_adapter(model: nn.Module, folder: Path, weights: Weights | None = None) -> Adapter:
    """Puts the adapter of a folder into a model. Raises ConfigError when it does not fit."""
    config = _for_model(read_config(folder), model, folder)
    try:
        tensors = load_file(folder / FILE)
    except Exception as error:
        raise ConfigError(f"{folder / FILE} cannot be read: {error}") from None
    if config["peft_type"] != "LORA":
        return _loaded_prompt(model, config, tensors, folder, weights)
    adapter = inject(model, config, weights)
    names = {_peft_name(name, adapter): name for name, _ in model.named_parameters(remove_duplicate=False)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = [_peft_name(name, adapter) for name in adapter.parameters(model)]
    missing = [key for key in missing if key not in tensors]
    unknown = [key for key in tensors if key not in names]
    if missing or unknown:
        base = config.get("base_model_name_or_path")
        told = f"missing {missing[:3]}, unexpected {unknown[:3]}; it was made for {base}"
        raise ConfigError(f"{folder} does not fit the model: {told}.")
    for key, tensor in tensors.items():
        parameter = parameters[names[key]]
        if parameter.shape != tensor.shape:
            raise ConfigError(
                f"{folder}: {key} has the shape {list(tensor.shape)}, here it is {list(parameter.shape)}."
            )
        _set(names[key], parameter, tensor, weights)
    return adapter


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises ConfigError for what minitrain cannot do."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / CONFIG_FILE} cannot be read: {error}") from None
    if kind not in ("LORA", *KINDS.values()):
        raise ConfigError(f"{folder}: an adapter of the kind {kind}, which is not known here.")
    needed = REQUIRED["LORA" if kind == "LORA" else "PROMPT"]
    if lacking := [key for key in needed if config.get(key) is None]:
        raise ConfigError(f"{folder / CONFIG_FILE} does not say {', '.join(lacking)}.")
    if odd := [key for key, types in needed.items() if not isinstance(config[key], types)]:
        raise ConfigError(f"{folder / CONFIG_FILE}: {odd[0]} cannot be {config[odd[0]]!r}.")
    for key in FOREIGN:
        if config.get(key):
            raise ConfigError(f"{folder}: it uses {key}, which is not known here.")
    if isinstance(config.get("init_lora_weights"), str) and config["init_lora_weights"] not in ("gaussian", "eva"):
        raise ConfigError(
            f"{folder}: an adapter that was started by {config['init_lora_weights']} and goes on a changed base model. "
            "Save it with path_initial_model_for_weight_conversion, which makes an ordinary LoRA of it."
        )
    return {"bias": "none"} | config  # torchtune writes no more than what is needed


def outputs_of(folder: Path) -> list[str] | None:
    """Names of the scalars that an adapter's model ends in; None for a vocabulary. Raises ConfigError."""
    config = read_config(folder)
    if config.get("task_type") != "SEQ_CLS":
        return None
    if "minitrain_outputs" in config:
        return config["minitrain_outputs"]
    with safe_open(folder / FILE, "pt") as file:  # PEFT notes no names
        heads = [key for key in file.keys() if key.endswith(HEADS)]  # noqa: SIM118
        if not heads:
            raise ConfigError(f"{folder}: it holds no head, so nobody knows what its model ends in.")
        return [f"LABEL_{number}" for number in range(file.get_slice(heads[0]).get_shape()[0])]


def _for_model(config: dict[str, Any], model: nn.Module, folder: Path) -> dict[str, Any]:
    """adapter_config.json with the names of `modules_to_save` as PEFT takes them: all modules that end in one.

    Raises ConfigError for an adapter of a model that ends otherwise.
    """
    ends, heads = config.get("task_type") == "SEQ_CLS", heads_of(model)
    named, ours = config.get("minitrain_outputs"), list(model.config.id2label.values())
    if ends != bool(heads.trained) or (named and named != ours):
        told = f"{', '.join(named or ['scalars'])}" if ends else "a vocabulary"
        here = ", ".join(ours) if heads.trained else "a vocabulary"
        raise ConfigError(f"{folder} is of a model that ends in {told}, and not in {here}.")
    wanted = [*(config.get("modules_to_save") or []), *(("classifier", "score") if ends else ())]
    whole = [name for name, _ in model.named_modules() if any(name.endswith(one) for one in wanted)]
    if lost := [name for name in heads.new if not any(f"{name}.".startswith(f"{one}.") for one in whole)]:
        raise ConfigError(f"{folder} holds no weights of {lost[0]}, which its base model lacks, too.")
    return config | {"modules_to_save": whole or None}


def save_adapter(model: nn.Module, adapter: Adapter, tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, which `peft.PeftModel.from_pretrained` loads."""
    if isinstance(adapter, PromptAdapter):
        found = {name: tensor.to("cpu").contiguous() for name, tensor in tensors}
        heads = tuple(f"{name}." for name in adapter.saved)
        kept = {f"{PROMPT_PREFIX}{name}": tensor for name, tensor in found.items() if name.startswith(heads)}
        _write(folder, kept | {TENSOR: vectors_of(found)}, adapter.config)
        return
    kept = {_peft_name(name, adapter): tensor.to("cpu").contiguous() for name, tensor in tensors}
    config = adapter.config | {"target_modules": _concise(adapter, model)}
    config |= {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    config["modules_to_save"] = adapter.saved or None  # whole names: PEFT takes all that end in one
    config["fan_in_fan_out"] = any(lora.is_transposed(m) and not isinstance(m, nn.Embedding) for m in model.modules())
    if adapter.taken:
        _give_back(adapter, kept, config)
    _write(folder, kept, config)


def _write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"inference_mode": True}, indent=2) + "\n")


def _base_config(config: Config, model: nn.Module) -> dict[str, Any]:
    """What adapter_config.json says of the base model."""
    quantization = config.model.quantization
    return {
        "task_type": "SEQ_CLS" if heads_of(model).trained else "CAUSAL_LM",
        "base_model_name_or_path": config.model.name_or_path,
        "revision": config.model.revision,
        **({"minitrain_quantization": quantization} if quantization != "none" else {}),
        **({"minitrain_outputs": list(model.config.id2label.values())} if heads_of(model).trained else {}),
    }


def _new_config(config: Config, model: nn.Module) -> dict[str, Any]:
    """adapter_config.json for the options of a LoRA. A scalar head is new, and so trained whole."""
    options = config.lora
    whole = [*options.modules_to_save, *heads_of(model).trained]
    return _base_config(config, model) | {
        "peft_type": "LORA",
        "r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": options.target_modules,
        "exclude_modules": options.exclude_modules,
        "layers_to_transform": options.layers_to_transform,
        "modules_to_save": whole or None,
        "bias": options.bias,
        "use_rslora": options.use_rslora,
        "use_dora": options.use_dora,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
    }


def _new_prompt(config: Config, model: nn.Module, tokenizer, weights: Weights | None) -> PromptAdapter:
    _refuse_encoder(model)
    options, embeddings = config.soft_prompt, model.get_input_embeddings()
    model.soft_prompt = SoftPrompt(model, options, config.seed)
    if options.method == "prompt":
        if options.init_text:
            ids = tokenizer(options.init_text, add_special_tokens=False)["input_ids"]
            ids = (ids * (options.num_virtual_tokens // max(1, len(ids)) + 1))[: options.num_virtual_tokens]
        else:  # any tokens are a better start than noise (section 3.2 of Lester et al.)
            generator = torch.Generator().manual_seed(config.seed)
            ids = torch.randint(len(tokenizer), (options.num_virtual_tokens,), generator=generator).tolist()
        name = next(name for name, p in model.named_parameters() if p is embeddings.weight)
        rows = [embeddings.weight[i] if weights is None else weights.rows(name, i, i + 1)[0] for i in ids]
        with torch.no_grad():
            model.soft_prompt.weight.copy_(torch.stack(rows))
    return _known_prompt(model, prompt_config(options, model, _base_config(config, model)), weights)


def _prompt_options(config: dict[str, Any]) -> SoftPromptConfig:
    """The options of a prompt that was saved."""
    method = next(name for name, kind in KINDS.items() if kind == config["peft_type"])
    return SoftPromptConfig(num_virtual_tokens=config["num_virtual_tokens"], method=method)


def _loaded_prompt(
    model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path, weights: Weights | None
) -> PromptAdapter:
    _refuse_encoder(model)
    found = tensors.get(TENSOR)
    model.soft_prompt = SoftPrompt(model, _prompt_options(config), 0)
    wanted = model.soft_prompt.weight.shape
    if found is None or found.shape != wanted:
        shape = "missing" if found is None else list(found.shape)
        raise ConfigError(f"{folder}: {TENSOR} does not fit the model: it is {shape}, here it is {list(wanted)}.")
    with torch.no_grad():
        model.soft_prompt.weight.copy_(found)
    adapter = _known_prompt(model, config, weights)
    for name, parameter in adapter.parameters(model).items():
        if not name.startswith("soft_prompt."):
            found = tensors.get(f"{PROMPT_PREFIX}{name}")
            if found is None or found.shape != parameter.shape:
                raise ConfigError(f"{folder}: {name} is missing, or not of the shape {list(parameter.shape)}.")
            _set(name, parameter, found, weights)
    return adapter


def _refuse_encoder(model: nn.Module) -> None:
    if is_encoder(model):
        told = f"{type(model).__name__} is an encoder, whose first place is its head's; train it with lora"
        raise ConfigError(f"soft_prompt: {told}.")


def _known_prompt(model: nn.Module, config: dict[str, Any], weights: Weights | None) -> PromptAdapter:
    adapter = PromptAdapter(config, {}, saved=heads_of(model).trained)
    if weights is not None:
        weights.replace({name: p.detach() for name, p in adapter.parameters(model).items()})
    return adapter


def _start(adapter: Adapter, name: str, module: nn.Module, config: Config, weights: Weights | None) -> None:
    """Initial values of one layer's matrices."""
    key = f"{name}.weight"

    def weight() -> Tensor:
        if weights is None:
            return lora.dense_weight(module).detach().float()
        whole = weights.rows(key, 0, module.weight.shape[0]).float()
        return whole.T if lora.is_transposed(module) else whole

    kind = config.lora.init
    first, second = lora.initial_values(kind, weight, module, name, config.seed)
    if config.lora.use_dora:
        _set(f"{name}.lora_magnitude_vector", module.lora_magnitude_vector, weight().norm(dim=1), weights)
    kinds = ("lora_embedding_A", "lora_embedding_B") if isinstance(module, nn.Embedding) else ("lora_A", "lora_B")
    for matrix, parameter, value in zip(kinds, lora.matrices(module), (first, second), strict=True):
        _set(f"{name}.{matrix}", parameter, value, weights)
    if kind in ("pissa", "olora") and not isinstance(module, nn.Embedding):
        adapter.taken[name] = (first, second)
        update = module.lora.scaling * second  # [out, r]
        left, right = (first.T, update.T) if lora.is_transposed(module) else (update, first)
        if weights is not None:
            weights.sources[key] = Less(weights.sources[key], left, right)
        else:
            with torch.no_grad():
                module.weight.copy_(module.weight.float() - (left @ right).to(module.weight.device))


def _set(name: str, parameter: nn.Parameter, value: Tensor, weights: Weights | None) -> None:
    if weights is not None:
        weights.replace({name: value})
    else:
        with torch.no_grad():
            parameter.copy_(value)


def _peft_name(name: str, adapter: Adapter) -> str:
    """`model.layers.0.q_proj.lora_A` -> `base_model.model.model.layers.0.q_proj.lora_A.weight`."""
    module, _, last = name.rpartition(".")
    if last in ("lora_A", "lora_B"):
        return f"{PREFIX}{name}.weight"
    inner = ".base_layer" if module in adapter.adapted and last not in lora.MATRICES else ""
    return f"{PREFIX}{module}{inner}.{last}"


def _concise(adapter: Adapter, model: nn.Module) -> list[str]:
    """The last parts of the adapted layers' names, where these mean the same layers; else the whole names."""
    short = {name.rpartition(".")[2] for name in adapter.adapted}
    meant = [n for n, m in model.named_modules() if n.rpartition(".")[2] in short and lora.is_adaptable(m)]
    return sorted(short) if len(meant) == len(adapter.adapted) else sorted(adapter.adapted)


def _give_back(adapter: Adapter, kept: dict[str, Tensor], config: dict[str, Any]) -> None:
    """A LoRA of twice the rank on the base model as it was: BA - B0 A0 = [B, -B0] [A; A0]."""
    for name, (first, second) in adapter.taken.items():
        key_a, key_b = f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"
        kept[key_a] = torch.cat([kept[key_a], first])
        kept[key_b] = torch.cat([kept[key_b], -second], 1)
    config["r"] *= 2
    config["lora_alpha"] *= math.sqrt(2) if config["use_rslora"] else 2
