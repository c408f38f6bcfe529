"""Save a model or an adapter with its tokenizer, in the format that `from_pretrained` reads."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from minitrain.errors import ConfigError
from minitrain.io.tensor_files import save_file

from .adapter_files import save_adapter
from .diagnostics import first_line
from .dtypes import DtypePlan
from .pretrained import no_progress_bar
from .weights import add_weights, by_file, full_tensors, save_weights

VALUE_HEAD_FILE = "value_head.safetensors"


def save_model(
    model: nn.Module,
    tokenizer,
    folder: Path,
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, torch.Tensor]] | None = None,
    value_head: dict[str, torch.Tensor] | None = None,
) -> None:
    """Save the weights, config, tokenizer and chat template of a model, or only the adapter of a model with one.

    Args:
        model: The transformers model.
        tokenizer: Its tokenizer.
        folder: Folder for the files.
        dtype: Dtype of the saved weights; adapters are saved in float32.
        tensors: Name and unsharded value of each tensor if the model is sharded; see `weights.full_tensors`.
        value_head: State dict of a value head.
    """
    tensors = tensors or full_tensors(model, lambda tensor: tensor)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    if value_head:
        save_file({name: tensor.cpu() for name, tensor in value_head.items()}, folder / VALUE_HEAD_FILE)
    if getattr(model, "adapter", None) is not None:
        save_adapter(model, model.adapter, tensors, folder)
        return
    if getattr(model, "_weight_conversions", None):  # transformers converts the names in its files
        _save_converted(model, tensors, folder, dtype)
    else:
        save_weights(model, tensors, folder, dtype)
        _mark_untied(model)
    if (other := getattr(model, "other_tensors", None)) is not None and other.sources:
        add_weights(folder, other)
    _save_configs(model, folder, dtype)


def save_merged(
    model: nn.Module, folder: Path, dtype: torch.dtype, tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Save the weights of a model with its adapter merged, for a program that has its config and tokenizer.

    Args:
        model: The transformers model.
        folder: Folder for the files.
        dtype: Dtype of the saved weights.
        tensors: Its `merged_tensors`.
    """
    if getattr(model, "_weight_conversions", None):
        _save_converted(model, tensors, folder, dtype)
        return
    plan = DtypePlan(model, dtype)
    in_dtype = ((name, tensor.to("cpu", plan(name, tensor))) for name, tensor in tensors)
    for number, file_tensors in enumerate(by_file(in_dtype), 1):
        save_file(file_tensors, folder / f"model-{number:05}.safetensors", metadata={"format": "pt"})


def check_saving(model: nn.Module, tokenizer) -> None:
    """Save everything except the weights to a temporary folder, so that an error occurs before training.

    Raises:
        ConfigError: The config or the tokenizer cannot be saved.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            if getattr(model, "adapter", None) is None:
                _save_configs(model, Path(folder), torch.float32)
    except Exception as error:
        raise ConfigError(
            f"model.name_or_path: the model could not be saved after training: {first_line(error)} "
            "Fix config.json or the tokenizer in the model's folder.",
            "unsupported-model",
        ) from None


def set_end_tokens(model: nn.Module, end_ids: list[int]) -> None:
    """Set the EOS tokens of the saved model to those of training instead of those of the base model."""
    if model.can_generate():
        ends = end_ids[0] if len(end_ids) == 1 else end_ids
        model.generation_config.eos_token_id = model.config.eos_token_id = ends


def _save_converted(
    model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, dtype: torch.dtype
) -> None:
    """Save with transformers, which uses the names in the base model's files."""
    plan = DtypePlan(model, dtype)
    state = {name: tensor.to("cpu", plan(name, tensor)) for name, tensor in tensors}
    defaults = getattr(model, "generation_config", None)
    if defaults is not None:
        model.generation_config = type(defaults)()  # save_pretrained refuses settings of some published models
    try:
        with no_progress_bar():
            model.save_pretrained(folder, state_dict=state)
    finally:
        if defaults is not None:
            model.generation_config = defaults
    for file in folder.glob("*.safetensors"):
        file.chmod((folder / "config.json").stat().st_mode)


def _save_configs(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Write config.json, generation_config.json and the code of a model with custom code."""
    from transformers.dynamic_module_utils import custom_object_save

    model.config.architectures = [type(model).__name__]
    if type(model)._auto_class is not None:
        custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    if model.can_generate():
        # Not with `save_pretrained`, which refuses settings of some published models (a temperature without sampling).
        model.generation_config.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    for nested in config.values():
        if isinstance(nested, dict) and "dtype" in nested:  # a text_config
            nested["dtype"] = config["dtype"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _mark_untied(model: nn.Module) -> None:
    """Mark embeddings and LM head as untied in the config if they are now separate tensors."""
    head, text = model.get_output_embeddings(), model.config.get_text_config()
    if head is None:
        return
    if getattr(text, "tie_word_embeddings", False) and head.weight is not model.get_input_embeddings().weight:
        text.tie_word_embeddings = model.config.tie_word_embeddings = False
