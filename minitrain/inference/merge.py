"""Merge adapters into the weights of their base model: `minitrain merge`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from minitrain.config.sections import ModelConfig
from minitrain.data.template import Template
from minitrain.errors import ConfigError
from minitrain.model.adapter_config import read_config
from minitrain.model.load import DTYPES, load_base, load_tokenizer, merge_adapter, trained_outputs
from minitrain.model.save import check_saving, save_model, set_end_tokens
from minitrain.model.sequence_head import heads_of
from minitrain.training.atomic_dir import atomic_folder
from minitrain.training.saving import check_target

from .generate import model_config, saved_dtype
from .resolve import find_model


def merge_adapters(
    sources: Sequence[str | Path],
    output: str | Path,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
) -> str:
    """Merge LoRA adapters into their base model and write it: base + sum of weights[i] * (change of adapter i).

    Sums are computed in float32 and cast once. If the base model was quantized in training, its weights are rounded by
    the same quantization.

    Args:
        sources: Run directories or folders of adapters, all of the same base model.
        output: The folder to write. A model in it is replaced.
        weights: Weight of each adapter (default: 1).
        dtype: "float32", "bfloat16" or "float16" (default: that of the base model).

    Returns:
        The dtype of the saved weights.

    Raises:
        ConfigError: The adapters have different base models or heads, or an argument is invalid.
    """
    output, weights = Path(output), [1.0] * len(sources) if weights is None else weights
    _check_arguments(sources, output, weights, dtype)
    sources = list(map(str, sources))
    configs = [model_config(find_model(source)) for source in sources]
    labels = _check_adapters(sources, configs)
    if Path(configs[0].name_or_path).resolve() == output.resolve():
        raise ConfigError(f"output: {output} is the base model of the adapters. Choose another folder.", "conflict")
    tokenizer = load_tokenizer(configs[0], scores=labels is not None)
    model = load_base(configs[0], tokenizer)
    if tokenizer.chat_template:
        set_end_tokens(model, Template(tokenizer).end_ids())
    check_saving(model, tokenizer)
    _add_changes(model, configs, weights)
    dtype = dtype or saved_dtype(configs[0]) or "float32"
    with atomic_folder(output) as folder:
        save_model(model, tokenizer, folder, DTYPES[dtype])
    return dtype


def _check_arguments(sources: Sequence[str | Path], output: Path, weights: Sequence[float], dtype: str | None) -> None:
    if isinstance(sources, (str, Path)):
        raise ConfigError(f"sources: expected a list, got {str(sources)!r}. Write [{str(sources)!r}].", "wrong-type")
    if len(weights) != len(sources) or not sources:
        message = f"weights: expected one number per adapter ({len(sources)}), got {len(weights)}. Set all of them."
        raise ConfigError(message, "mismatch")
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}. Choose one.", "not-a-choice")
    check_target(output)


def _check_adapters(sources: Sequence[str], configs: Sequence[ModelConfig]) -> list[str] | None:
    """Return the labels of the models' sequence head, or None without one.

    Raises:
        ConfigError: The adapters have different base models or heads.
    """
    for source, config in zip(sources, configs, strict=True):
        if config.adapter is None or read_config(Path(config.adapter))["peft_type"] != "LORA":
            kind = "a full model" if config.adapter is None else "a soft prompt"
            raise ConfigError(
                f"{source}: is {kind}, which is used as it is. Name LoRA adapters only.", "unsupported-model"
            )
        if _base(config) != _base(configs[0]):
            bases = f"is an adapter of {_base(config)}, but {sources[0]} of {_base(configs[0])}"
            raise ConfigError(f"{source}: {bases}. Merge adapters of one base model.", "mismatch")
    first, *others = [trained_outputs(config) for config in configs]
    for source, labels in zip(sources[1:], others, strict=True):
        if labels != first:
            message = f"{source}: its head has other labels than that of {sources[0]}. Merge adapters with one head."
            raise ConfigError(message, "mismatch")
    return first


def _add_changes(model: nn.Module, configs: Sequence[ModelConfig], weights: Sequence[float]) -> None:
    """Add weights[i] * (change by adapter i) to the weights of the base model."""
    for name in heads_of(model).new:  # layers that the base model lacks come from the adapters alone
        for parameter in model.get_submodule(name).parameters():
            parameter.data.zero_()
    before = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    total = {}
    for config, weight in zip(configs, weights, strict=True):
        adapter = merge_adapter(model, Path(config.adapter))
        if adapter.other_tensors:
            reason = f"{next(iter(adapter.other_tensors))} adapts a layer outside the text part, which is not merged"
            raise ConfigError(f"{config.adapter}: {reason}. Merge it with PEFT.", "unsupported-model")
        with torch.no_grad():
            for name, parameter in model.named_parameters(remove_duplicate=False):
                change = parameter - before[name]
                if change.any():
                    total[name] = total.get(name, 0) + weight * change
                parameter.copy_(before[name])
    with torch.no_grad():
        for name, change in total.items():
            model.get_parameter(name).add_(change)


def _base(config: ModelConfig) -> str:
    quantized = f" in {config.quantization}" if config.quantization != "none" else ""
    return f"{config.name_or_path}{f'@{config.revision}' if config.revision else ''}{quantized}"
