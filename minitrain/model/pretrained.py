"""Models as transformers makes them from a folder or the hub: with their weights, or without memory for these."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..hub import ask_for
from ..schema import ModelConfig
from .damage import named, no_model, refuse_encoder, refuse_gaps
from .weights import Weights, open_weights, parameters_on_meta


def auto_class(outputs: list[str] | None) -> tuple[type, dict[str, int]]:
    """transformers' class of models that end in these scalars, or in a vocabulary, and what it has to be told."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if outputs is None:
        return AutoModelForCausalLM, {}
    return AutoModelForSequenceClassification, {"num_labels": len(outputs)}


def from_pretrained(
    config: ModelConfig, dtype: torch.dtype, outputs: list[str] | None, seed: int
) -> tuple[nn.Module, set[str]]:
    """The model, and the parameters that its files do not hold; these are drawn by `seed`."""
    kind, number = auto_class(outputs)
    ask_for(config.name_or_path)
    try:
        with torch.random.fork_rng(devices=[]), without_bar():
            torch.manual_seed(seed)
            model, found = kind.from_pretrained(
                config.name_or_path,
                revision=config.revision,
                dtype=dtype,
                attn_implementation=attention_of(config),
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # which are refused below
                **number,
            )
        vars(model).pop("generate", None)  # a custom_generate of the repository would follow options of its own
        if outputs is None:
            refuse_encoder(model.config)
    except Exception as error:
        raise no_model(config, named(outputs), error) from None
    refuse_gaps(config, found, outputs)
    return model, found["missing_keys"]


def empty_model(config: ModelConfig, dtype: torch.dtype) -> tuple[nn.Module | None, Weights | None]:
    """A model whose parameters have no memory yet, and where their rows are; (None, None) when files do not fit it."""
    from transformers import AutoConfig, GenerationConfig

    kind, _ = auto_class(None)
    where = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    ask_for(config.name_or_path)
    try:
        shape = AutoConfig.from_pretrained(config.name_or_path, **where)
        refuse_encoder(shape)
        with parameters_on_meta():
            attends, trust = attention_of(config), config.trust_remote_code
            model = kind.from_config(shape, dtype=dtype, attn_implementation=attends, trust_remote_code=trust)
        weights = open_weights(config.name_or_path, config.revision, model)
    except Exception as error:
        raise no_model(config, named(None), error) from None
    if weights is None:
        return None, None
    with contextlib.suppress(OSError):  # not every model has one
        model.generation_config = GenerationConfig.from_pretrained(config.name_or_path, revision=config.revision)
    return model, weights


def attention_of(config: ModelConfig) -> str | None:
    """What transformers is asked for; None leaves the choice to it."""
    return None if config.attn_implementation == "auto" else config.attn_implementation


@contextlib.contextmanager
def without_bar() -> Iterator[None]:
    """transformers' bars would stand among our lines, and in runs that are to be quiet."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
