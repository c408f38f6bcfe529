"""Load models from a folder or the Hub with transformers, with their weights or on the meta device."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from minitrain.config.sections import ModelConfig
from minitrain.io.hub import check_hub

from .dequantize import dequantized, describe_dequantized, method_of
from .diagnostics import (
    check_can_score,
    check_is_decoder,
    check_missing_keys,
    describe_head,
    describe_unused,
    drop_head_keys,
    log_model_warnings,
    model_load_error,
)
from .multimodal import is_multimodal, keep_text_part, read_other_tensors
from .weights import find_gaps, parameters_on_meta, weight_files


def auto_class(hf_config, outputs: list[str] | None) -> type:
    """Return the class of transformers that loads a causal LM or a model with a scalar head."""
    import transformers

    if outputs is not None:
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModelForMultimodalLM if is_multimodal(hf_config) else transformers.AutoModelForCausalLM


def read_model_config(config: ModelConfig, **changes):
    """Return the transformers config of a model, without keys that load code.

    Raises:
        Exception: Any error of transformers.
        ConfigError: The quantization of the model is not supported.
    """
    from transformers import AutoConfig

    check_hub(config.name_or_path)
    source = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    hf_config = AutoConfig.from_pretrained(config.name_or_path, **source, **changes)
    for nested in nested_configs(hf_config):
        # transformers would load the kernel named here from the Hub (CVE-2026-4372).
        nested._attn_implementation = nested._experts_implementation = None
        vars(nested).pop("fusion_config", None)
    if quantization := quantization_of(hf_config):
        method_of(quantization)
    return hf_config


def quantization_of(hf_config) -> dict | None:
    """Return the quantization_config of a config or of a nested one, or None."""
    for nested in nested_configs(hf_config):
        if quantization := vars(nested).get("quantization_config") or vars(nested).get("compression_config"):
            return quantization if isinstance(quantization, dict) else quantization.to_dict()
    return None


def nested_configs(hf_config) -> Iterator:
    """Yield a config and all configs nested in it."""
    from transformers import PreTrainedConfig

    yield hf_config
    for value in vars(hf_config).values():
        if isinstance(value, PreTrainedConfig):
            yield from nested_configs(value)


def from_pretrained(
    config: ModelConfig, dtype: torch.dtype, outputs: list[str] | None, seed: int, device: torch.device
) -> tuple[nn.Module, list[str]]:
    """Load a model with its weights, or build it on the meta device, where no weights are read.

    `load_notes` of the model has the lines about its files. They are logged if its weights are read.

    Args:
        config: The model options.
        dtype: Dtype of the parameters.
        outputs: Labels of a scalar head; None loads a causal LM.
        seed: Seed of parameters that the files lack.
        device: The CPU or the meta device.

    Returns:
        The model, and the names of the parameters that are missing in its files.

    Raises:
        ConfigError: The model cannot be loaded.
    """
    options = {"attn_implementation": attention_of(config), "trust_remote_code": config.trust_remote_code}
    try:
        hf_config = read_model_config(config, **({} if outputs is None else {"num_labels": len(outputs)}))
        model_class = auto_class(hf_config, outputs)
        if outputs is None:
            check_is_decoder(hf_config)
        else:
            check_can_score(hf_config)
        quantization = pop_quantization(hf_config)
        if quantization or device.type == "meta":
            with parameters_on_meta():
                model = model_class.from_config(hf_config, dtype=dtype, **options)
        notes = [describe_dequantized(model, quantization, dtype)] if quantization else []
        if device.type == "meta":
            loading_info = find_gaps(None if quantization else Path(config.name_or_path), model)
            _read_generation_config(model, config)
        else:
            log_model_warnings(config.name_or_path, notes)
            with torch.random.fork_rng(devices=[]), no_progress_bar():
                torch.manual_seed(seed)
                if quantization:
                    model, loading_info = _dequantized(config, model, quantization, dtype)
                else:
                    model, loading_info = _read_model(config, hf_config, dtype, model_class, options)
        removed = keep_text_part(model) if outputs is None else {}
        if removed and device.type != "meta":
            files = [] if quantization else weight_files(config.name_or_path, config.revision)
            read_other_tensors(model, files, removed)
        vars(model).pop("generate", None)  # custom code of a repository ignores our sampling options
    except Exception as error:
        raise model_load_error(config, describe_head(outputs), error) from None
    check_missing_keys(config, loading_info, outputs)
    unused = describe_unused(drop_head_keys(loading_info["unexpected_keys"], outputs))
    if device.type != "meta":
        log_model_warnings(config.name_or_path, unused)
    model.load_notes = notes + unused
    return model, loading_info["missing_keys"]


def pop_quantization(hf_config) -> dict | None:
    """Remove the quantization_config from a config and its parts, and return it if there is one."""
    quantization = quantization_of(hf_config)
    for nested in nested_configs(hf_config):
        for key in ("quantization_config", "compression_config"):
            vars(nested).pop(key, None)
    return quantization


def _read_model(
    config: ModelConfig, hf_config, dtype: torch.dtype, model_class: type, options: dict
) -> tuple[nn.Module, dict]:
    """Return a model with the weights in its files, and its loading info."""
    return model_class.from_pretrained(
        config.name_or_path,
        config=hf_config,
        revision=config.revision,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # check_missing_keys reports them
        **options,
    )


def _dequantized(
    config: ModelConfig, empty: nn.Module, quantization: dict, dtype: torch.dtype
) -> tuple[nn.Module, dict]:
    """Return a model like `empty` with dequantized weights, and its loading info."""
    state = dequantized(weight_files(config.name_or_path, config.revision), quantization, dtype)
    model, loading_info = type(empty).from_pretrained(
        None,
        config=empty.config,
        state_dict=state,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        attn_implementation=attention_of(config),
    )
    model.config.name_or_path = config.name_or_path
    _read_generation_config(model, config)
    return model, loading_info


def _read_generation_config(model: nn.Module, config: ModelConfig) -> None:
    from transformers import GenerationConfig

    if not model.can_generate():
        return
    with contextlib.suppress(OSError):  # some models do not have one
        model.generation_config = GenerationConfig.from_pretrained(config.name_or_path, revision=config.revision)


def attention_of(config: ModelConfig) -> str | None:
    """Return transformers' `attn_implementation`; None lets it choose."""
    return None if config.attn_implementation == "auto" else config.attn_implementation


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """Within the context, hide the progress bars of transformers, which would mix with log lines."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
