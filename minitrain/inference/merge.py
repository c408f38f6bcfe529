"""Adapters made part of the weights: `minitrain merge`."""

from pathlib import Path

import torch

from minitrain.config.schema import ModelConfig
from minitrain.data.template import Template
from minitrain.errors import ConfigError
from minitrain.model.adapter_config import read_config
from minitrain.model.load import DTYPES, load_base, load_tokenizer, merge_adapter, trained_outputs
from minitrain.model.save import check_saving, save_model, set_end_tokens
from minitrain.model.sequence_head import heads_of
from minitrain.training.atomic_dir import atomic_folder

from .generate import model_config, saved_dtype
from .resolve import find_model


def merge_adapters(sources: list[str], shares: list[float], output: Path, dtype: str | None = None) -> str:
    """Writes the base model with `shares[i]` times the change that adapter i makes to it; returns its dtype.

    Sums are made in float32 and cast once, to `dtype` or that of the base model. Adapters have to be of the same base,
    which may be quantised: then the weights are those that quantisation has rounded, as they were while training.
    Raises ConfigError.
    """
    configs = [model_config(find_model(source)) for source in sources]
    for source, config in zip(sources, configs, strict=True):
        if config.adapter is None or read_config(Path(config.adapter))["peft_type"] != "LORA":
            raise ConfigError(f"{source}: holds no LoRA, so there is nothing to merge.", "unsupported-model")
        if _base(config) != _base(configs[0]):
            raise ConfigError(
                f"{source} is an adapter of {_base(config)}, {sources[0]} of {_base(configs[0])}.", "mismatch"
            )
    ends = [trained_outputs(config) for config in configs]
    for source, end in zip(sources, ends, strict=True):
        if end != ends[0]:
            raise ConfigError(
                f"{source} and {sources[0]} are adapters of models that end in other outputs.", "mismatch"
            )
    if Path(configs[0].name_or_path).resolve() == output.resolve():
        raise ConfigError(f"--output: {output} is the base model, and the adapters would no longer fit it.", "conflict")
    tokenizer = load_tokenizer(configs[0], scores=ends[0] is not None)
    model = load_base(configs[0], tokenizer)
    if tokenizer.chat_template:
        set_end_tokens(model, Template(tokenizer).end_ids())
    check_saving(model, tokenizer)
    for name in heads_of(model).new:  # what the base has not is all of the adapters
        for parameter in model.get_submodule(name).parameters():
            parameter.data.zero_()
    before = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    total = {}
    for config, share in zip(configs, shares, strict=True):
        merge_adapter(model, Path(config.adapter))
        with torch.no_grad():
            for name, parameter in model.named_parameters(remove_duplicate=False):
                change = parameter - before[name]
                if change.any():
                    total[name] = total.get(name, 0) + share * change
                parameter.copy_(before[name])
    with torch.no_grad():
        for name, change in total.items():
            model.get_parameter(name).add_(change)
    dtype = dtype or saved_dtype(configs[0]) or "float32"
    with atomic_folder(output) as temporary:
        save_model(model, tokenizer, temporary, DTYPES[dtype])
    return dtype


def _base(config: ModelConfig) -> str:
    quantized = f" in {config.quantization}" if config.quantization != "none" else ""
    return f"{config.name_or_path}{f'@{config.revision}' if config.revision else ''}{quantized}"
