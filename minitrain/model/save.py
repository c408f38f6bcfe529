"""A model's folder as `from_pretrained` reads it: weights, config, tokenizer and template; or an adapter's."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from ..tensor_files import save_file
from .adapter_files import save_adapter
from .pretrained import without_bar
from .weights import save_weights, whole_tensors

VALUE_HEAD_FILE = "value_head.safetensors"


def save_model(
    model: nn.Module,
    tokenizer,
    folder: Path,
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, torch.Tensor]] | None = None,
    value_head: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes what `from_pretrained` reads: weights cast once to `dtype`, tied ones once, tokenizer and template.

    Of a model with an adapter, it writes the adapter, in float32.

    `tensors` are those of `weights.whole_tensors` where the model's own are not whole.
    """
    tensors = tensors or whole_tensors(model, lambda tensor: tensor)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    if value_head:
        save_file({name: tensor.cpu() for name, tensor in value_head.items()}, folder / VALUE_HEAD_FILE)
    if getattr(model, "adapter", None) is not None:
        save_adapter(model, model.adapter, tensors, folder)
        return
    if getattr(model, "_weight_conversions", None):  # transformers knows the names that its files had
        cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors}
        with without_bar():
            model.save_pretrained(folder, state_dict=cast)
        for file in folder.glob("*.safetensors"):
            file.chmod((folder / "config.json").stat().st_mode)
    else:
        save_weights(model, tensors, folder, dtype)
        _note_untied(model)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _note_untied(model: nn.Module) -> None:
    """So that a model whose output layer has come to differ from its embeddings is loaded with both."""
    head, text = model.get_output_embeddings(), model.config.get_text_config()
    if head is None:
        return
    if getattr(text, "tie_word_embeddings", False) and head.weight is not model.get_input_embeddings().weight:
        text.tie_word_embeddings = model.config.tie_word_embeddings = False
