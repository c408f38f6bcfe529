"""Load models of a folder or the Hub with transformers: with their weights, or on the meta device."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from minitrain.config.schema import ModelConfig
from minitrain.io.hub import ask_for

from .dequantize import dequantized, describe_dequantized, method_of
from .diagnostics import (
    check_missing_keys,
    describe_unused,
    log_of_model,
    model_load_error,
    named,
    refuse_encoder,
    without_head,
)
from .weights import Weights, open_weights, parameters_on_meta, weight_files


def auto_class(outputs: list[str] | None) -> tuple[type, dict[str, int]]:
    """Return transformers' class for a causal LM or a model with a scalar head, and its keyword arguments."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if outputs is None:
        return AutoModelForCausalLM, {}
    return AutoModelForSequenceClassification, {"num_labels": len(outputs)}


def read_model_config(config: ModelConfig, **changes):
    """Return transformers' config of a model, without keys that load code.

    Raises:
        Exception: What transformers raises.
        ConfigError: minitrain cannot read the model's quantization.
    """
    from transformers import AutoConfig

    ask_for(config.name_or_path)
    where = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    shape = AutoConfig.from_pretrained(config.name_or_path, **where, **changes)
    for part in _parts(shape):
        # transformers would load the kernel named here from the Hub (CVE-2026-4372).
        part._attn_implementation = part._experts_implementation = None
        vars(part).pop("fusion_config", None)
    if quantization := quantization_of(shape):
        method_of(quantization)
    return shape


def quantization_of(shape) -> dict | None:
    """Return the quantization_config of a config or of one nested in it, or None."""
    for part in _parts(shape):
        if found := vars(part).get("quantization_config") or vars(part).get("compression_config"):
            return found if isinstance(found, dict) else found.to_dict()
    return None


def _parts(shape) -> Iterator:
    """Yield a config and all configs nested in it."""
    from transformers import PreTrainedConfig

    yield shape
    for value in vars(shape).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def from_pretrained(
    config: ModelConfig, dtype: torch.dtype, outputs: list[str] | None, seed: int
) -> tuple[nn.Module, set[str]]:
    """Load a model with its weights.

    Args:
        config: The model options.
        dtype: Dtype of the parameters.
        outputs: Labels of a scalar head; None loads a causal LM.
        seed: Seed of parameters that the files lack.

    Returns:
        The model, and the names of the parameters that its files lack.

    Raises:
        ConfigError: The model cannot be loaded.
    """
    kind, number = auto_class(outputs)
    options = {"attn_implementation": attention_of(config), "trust_remote_code": config.trust_remote_code}
    try:
        shape = read_model_config(config, **number)
        if outputs is None:
            refuse_encoder(shape)
        with torch.random.fork_rng(devices=[]), without_bar():
            torch.manual_seed(seed)
            if quantization := quantization_of(shape):
                model, found = _from_quantized(config, shape, quantization, dtype, kind, options)
            else:
                model, found = kind.from_pretrained(
                    config.name_or_path,
                    config=shape,
                    revision=config.revision,
                    dtype=dtype,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # check_missing_keys refuses them
                    **options,
                )
        vars(model).pop("generate", None)  # custom code in the repository would ignore our options
    except Exception as error:
        raise model_load_error(config, named(outputs), error) from None
    check_missing_keys(config, found, outputs)
    log_of_model(config.name_or_path, describe_unused(without_head(found["unexpected_keys"], outputs)))
    return model, found["missing_keys"]


def _from_quantized(
    config: ModelConfig, shape, quantization: dict, dtype: torch.dtype, kind: type, options: dict
) -> tuple[nn.Module, dict]:
    """Load like `kind.from_pretrained`, with dequantized weights, and no quantization in the model's config."""
    for part in _parts(shape):
        for key in ("quantization_config", "compression_config"):
            vars(part).pop(key, None)
    with parameters_on_meta():
        empty = kind.from_config(shape, **options)
    log_of_model(config.name_or_path, [describe_dequantized(empty, quantization, dtype)])
    state = dequantized(weight_files(config.name_or_path, config.revision), quantization, dtype)
    model, found = type(empty).from_pretrained(
        None,
        config=empty.config,
        state_dict=state,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        attn_implementation=attention_of(config),
    )
    model.config.name_or_path = config.name_or_path
    if model.can_generate():
        _read_generation_config(model, config)
    return model, found


def empty_model(config: ModelConfig, dtype: torch.dtype) -> tuple[nn.Module | None, Weights | None]:
    """Return a model on the meta device and the weights in its files; (None, None) if these do not fit the model."""
    kind, _ = auto_class(None)
    try:
        shape = read_model_config(config)
        refuse_encoder(shape)
        if quantization_of(shape):
            return None, None
        with parameters_on_meta():
            attends, trust = attention_of(config), config.trust_remote_code
            model = kind.from_config(shape, dtype=dtype, attn_implementation=attends, trust_remote_code=trust)
        weights = open_weights(config.name_or_path, config.revision, model)
    except Exception as error:
        raise model_load_error(config, named(None), error) from None
    if weights is None:
        return None, None
    _read_generation_config(model, config)
    return model, weights


def _read_generation_config(model: nn.Module, config: ModelConfig) -> None:
    from transformers import GenerationConfig

    with contextlib.suppress(OSError):  # some models have none
        model.generation_config = GenerationConfig.from_pretrained(config.name_or_path, revision=config.revision)


def attention_of(config: ModelConfig) -> str | None:
    """Return transformers' `attn_implementation`; None lets it choose."""
    return None if config.attn_implementation == "auto" else config.attn_implementation


@contextlib.contextmanager
def without_bar() -> Iterator[None]:
    """Within the context, hide transformers' progress bars, which would mix with our lines, also with --quiet."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
