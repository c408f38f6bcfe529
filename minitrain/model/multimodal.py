"""The text part of a multimodal model, which is trained, and its other tensors, which are saved unchanged.

A multimodal model is loaded with the class of its files, so that its tensors and the layers of an adapter have the
names that transformers, PEFT and vLLM expect. Text does not pass through its vision tower, audio tower and projectors.
They are removed, so they need no memory, and nothing trains, quantizes, freezes or shards them. `save_model` copies
their tensors from the files of the base model.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minitrain.errors import ConfigError

from .decoder import decoder_of
from .weights import open_files


class RemovedModule(nn.Module):
    """Replaces a module that text does not pass through.

    Attributes:
        names: Names of the submodules that it had.
    """

    def __init__(self, removed: nn.Module):
        super().__init__()
        self.names = [name for name, _ in removed.named_modules() if name]
        self.register_buffer("nothing", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.nothing.device  # Qwen2-Audio reads it for every input


class OtherTensors:
    """The tensors of a multimodal model that its text part does not have.

    Attributes:
        prefixes: Names of the removed modules and parameters.
        n_parameters: Number of removed values.
        text_names: The names of decoder and LM head by those that they have in the class of the text part.
        parts: The names of the model's upper modules.
        sources: A function for each tensor that returns it, by its name in the saved files.
    """

    def __init__(self, prefixes: list[str], n_parameters: int, text_names: dict[str, str], parts: set[str]):
        self.prefixes, self.n_parameters, self.text_names, self.parts = prefixes, n_parameters, text_names, parts
        self.sources: dict[str, Callable[[], Tensor]] = {}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the value of each tensor."""
        return ((name, read()) for name, read in self.sources.items())

    def has(self, name: str) -> bool:
        """Return whether a name in the model belongs to a removed module."""
        return any(name == prefix or name.startswith(f"{prefix}.") for prefix in self.prefixes)

    def own_name(self, name: str) -> str:
        """Return the name in the model for one in it or in the class of its text part, such as Qwen3_5ForCausalLM."""
        first, _, rest = name.partition(".")
        if first not in self.text_names or f"{first}.{rest.partition('.')[0]}" in self.parts:
            return name
        return f"{self.text_names[first]}.{rest}" if rest else self.text_names[first]


def is_multimodal(hf_config) -> bool:
    """Return whether the files with this config are those of a multimodal class with an LM head.

    Raises:
        ConfigError: It is an encoder-decoder.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    if type(hf_config) not in AutoModelForMultimodalLM._model_mapping:
        return False
    if hf_config.is_encoder_decoder:
        reason = f"{hf_config.model_type} is an encoder-decoder, whose decoder needs more than text"
        raise ConfigError(f"{reason}. Use a decoder-only model.", "unsupported-model")
    if type(hf_config) not in AutoModelForCausalLM._model_mapping:
        return True
    return AutoModelForMultimodalLM._model_mapping[type(hf_config)].__name__ in (hf_config.architectures or ())


def check_text_part(model: nn.Module) -> None:
    """Raise ConfigError for a multimodal model that does not read text alone."""
    needed = inspect.signature(type(model).forward).parameters.values()
    required = [p.name for p in needed if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if missing := [name for name in required if name not in ("self", "input_ids")]:
        reason = f"{type(model).__name__} needs {' and '.join(missing)} with every text"
    elif model.get_output_embeddings() is None:
        reason = f"{type(model).__name__} has no LM head"
    else:
        return
    raise ConfigError(f"{reason}. Use a model that generates text from text alone.", "unsupported-model")


def keep_text_part(model: nn.Module) -> dict[str, Tensor]:
    """Remove the modules of a multimodal model that are neither in its decoder nor its embeddings and LM head.

    `other_tensors` of the model describes what was removed; it is None for a model that reads only text.

    Returns:
        The removed tensors by name.
    """
    model.other_tensors = None
    is_own = type(model).__module__.startswith("transformers.")  # custom code could need any of its modules
    if not is_own or model.config.get_text_config(decoder=True) is model.config:
        return {}
    check_text_part(model)
    text = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    removed = _removable(model, "", {id(module) for module in text})
    tensors = {id(tensor): tensor for _, _, one in removed for tensor in _tensors(one)}
    names = {id(module): name for name, module in model.named_modules()}
    text_names = {"model": names[id(decoder_of(model))], "lm_head": names[id(model.get_output_embeddings())]}
    n_parameters = sum(tensor.numel() for tensor in tensors.values())
    parts = {name for name in names.values() if name.count(".") == 1}
    model.other_tensors = OtherTensors([name for name, _, _ in removed], n_parameters, text_names, parts)
    state = {name: tensor for name, tensor in model.state_dict().items() if model.other_tensors.has(name)}
    for name, parent, one in removed:
        last = name.rpartition(".")[2]
        if isinstance(one, nn.Module):
            setattr(parent, last, RemovedModule(one))
        else:
            parent._parameters[last] = None
    return state


def read_other_tensors(model: nn.Module, paths: Iterable[Path], loaded: dict[str, Tensor]) -> None:
    """Find the tensors of a model that its text part does not have, to be read when it is saved.

    Args:
        model: The transformers model.
        paths: The safetensors files of the model.
        loaded: These tensors as transformers has loaded them. They are kept in memory if there are no files to read.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    other = model.other_tensors
    if other is None:
        return
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if not isinstance(entry, WeightRenaming)]
    for key, file in open_files(paths).items():  # open files stay readable if the folder is replaced
        name = rename_source_key(key, renamings, converters)[0]
        if other.has(name) or other.has(f"{model.base_model_prefix}.{name}"):
            other.sources[key] = functools.partial(file.get_tensor, key)
    if not other.sources:
        other.sources = {name: functools.partial(Tensor.clone, tensor) for name, tensor in loaded.items()}


def _removable(module: nn.Module, path: str, text: set[int]) -> list[tuple[str, nn.Module, nn.Module | nn.Parameter]]:
    """Return (name, parent, module or parameter) of what is outside the text part of a module that has one in it."""
    removable = [(f"{path}{name}", module, parameter) for name, parameter in module._parameters.items()]
    for name, child in module.named_children():
        if id(child) in text:
            continue
        if any(id(inner) in text for inner in child.modules()):
            removable += _removable(child, f"{path}{name}.", text)
        elif any(True for _ in _tensors(child)):
            removable.append((f"{path}{name}", module, child))
    return [entry for entry in removable if entry[2] is not None]


def _tensors(one: nn.Module | nn.Parameter) -> Iterable[Tensor]:
    return one.parameters() if isinstance(one, nn.Module) else [one]


def all_module_names(model: nn.Module) -> list[str]:
    """Return the names of the modules of a model, with those of its removed modules."""
    names = []
    for name, module in model.named_modules():
        names.append(name)
        if isinstance(module, RemovedModule):
            names += [f"{name}.{inner}" for inner in module.names]
    return names


def split_adapter(
    model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], key_prefix: str
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Return an adapter with the names of the model's class, and separately its tensors for removed modules.

    Args:
        model: The transformers model.
        config: The adapter_config.json. Its names can be those of the class of the text part.
        tensors: The tensors of the adapter by key.
        key_prefix: The prefix of the keys.
    """
    other = getattr(model, "other_tensors", None)
    if other is None:
        return config, tensors, {}
    config = dict(config)
    named = ("target_modules", "target_parameters", "modules_to_save", "trainable_token_indices")
    for option in (*named, "rank_pattern", "alpha_pattern"):
        if isinstance(value := config.get(option), dict):
            config[option] = {other.own_name(name): entry for name, entry in value.items()}
        elif isinstance(value, list) and all(isinstance(name, str) for name in value):
            config[option] = [other.own_name(name) for name in value]
    names = {key: other.own_name(key.removeprefix(key_prefix)) for key in tensors}
    removed = {key for key, name in names.items() if other.has(name)}
    own = {f"{key_prefix}{names[key]}": tensor for key, tensor in tensors.items() if key not in removed}
    return config, own, {key: tensors[key] for key in removed}


def describe_text_part(model: nn.Module) -> str | None:
    """Return a line about the modules that text does not pass through; None without any."""
    other = getattr(model, "other_tensors", None)
    if other is None or not other.prefixes:
        return None
    millions = f"{other.n_parameters / 1e6:,.1f} M parameters"
    return f"only the text part is trained; {', '.join(other.prefixes)} ({millions}) stay as they are"
