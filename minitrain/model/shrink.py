"""Make a small model with random weights out of the config of a large one: two layers, narrow, the same vocabulary.

What a config calls its sizes differs by architecture, so names are only proposals: a forward pass decides.
"""

import copy
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitrain.config.sections import ModelConfig
from minitrain.errors import ConfigError

from .diagnostics import first_line
from .load import load_tokenizer
from .pretrained import auto_class, nested_configs, no_progress_bar, pop_quantization, read_model_config

DEPTH, MIN_WIDTH = 2, 64
N_TOKENS = 8  # of the forward pass that tries a config
WIDTHS = re.compile(
    r"(\w+_)?(hidden_size\w*|intermediate_size\w*|ffn_dim|ffn_hidden_size|hidden_dim|d_model|d_ff|n_embd|n_inner"
    r"|d_inner|lru_width|embedding_size|embedding_dim|word_embed_proj_dim|mamba_d_ssm)"
)
HEADS = re.compile(r"(\w+_)?heads?|(\w+_)?num_query_groups")
LAYERS = re.compile(r"\w*layers\w*|first_k_dense_replace|layer_group_size")


def shrink_model(config: ModelConfig, folder: Path, min_width: int = MIN_WIDTH, head: str | None = None) -> str:
    """Save a small model like that of a config, with random weights and the tokenizer, and return its size in words.

    Args:
        config: The model options; no weights are read.
        folder: The new folder.
        min_width: Smallest width of a matrix, where the model is not narrower.
        head: None for a causal LM, "none" for a model without a head, "scores" for the head of a sequence classifier.

    Raises:
        ConfigError: No small model computes logits.
    """
    large = read_model_config(config)
    pop_quantization(large)
    text, problems = large.get_text_config(), []
    for factor in _factors(text, max(MIN_WIDTH, min_width)):
        small = copy.deepcopy(large)
        for part in nested_configs(small):
            _shrink(part, factor if part is small.get_text_config() else None)
        try:
            model = _random_model(small, config, head)
            _try(model)
        except Exception as error:  # a model can raise any error for a size that it does not support
            problems.append(first_line(error))
            continue
        with no_progress_bar():
            model.save_pretrained(folder)
        _copy_other_files(config, folder)
        now = small.get_text_config()
        n = sum(parameter.numel() for parameter in model.parameters())
        return (
            f"{type(model).__name__} with {now.num_hidden_layers} of {text.num_hidden_layers} layers and width "
            f"{now.hidden_size} of {text.hidden_size}: {n:,} parameters, random"
        )
    raise ConfigError(f"{config.name_or_path}: cannot be made small: {problems[-1]}", "unsupported-model")


def _factors(text: Any, min_width: int) -> Iterator[int]:
    """Yield by what the widths of a config can be divided, the largest number first, and at last 1."""
    width = text.hidden_size
    heads = getattr(text, "num_attention_heads", None) or width // MIN_WIDTH
    keys = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or width // heads
    for factor in range(width // min_width, 1, -1):
        keys_width = _divided(keys, factor, smallest=1) * head_dim
        fits_heads = heads % factor == 0 or factor % heads == 0
        if width % (4 * factor) == 0 and fits_heads and keys_width >= min(min_width, keys * head_dim):
            yield factor
    yield 1


def _shrink(config: Any, factor: int | None) -> None:
    """Leave two layers, or one of each kind, of a config or a part of it, and divide its widths.

    Args:
        config: The config, which is changed.
        factor: By what the widths are divided; None: by what they can be, since this part is removed after loading.
    """
    values = {key: value for key, value in vars(config).items() if key[0] != "_" and not isinstance(value, bool)}
    n_layers = getattr(config, "num_hidden_layers", 0)
    if not n_layers:
        return
    factor = factor or next(_factors(config, MIN_WIDTH))
    lists = {key: value for key, value in values.items() if isinstance(value, list) and len(value) == n_layers}
    by_layer = {key: value for key, value in lists.items() if value != list(range(n_layers))}  # not their numbers
    first: dict[tuple, int] = {}
    for number in range(n_layers):
        first.setdefault(tuple(str(value[number]) for value in by_layer.values()), number)
    kept = list(first.values())
    kept = sorted([*kept, *[number for number in range(n_layers) if number not in kept][: DEPTH - len(kept)]])
    for key, value in values.items():
        if key in by_layer:
            value = [value[number] for number in kept]
        elif LAYERS.fullmatch(key) and isinstance(value, int):
            value = len(kept) if value == n_layers else min(value, len(kept) - 1)
        elif LAYERS.fullmatch(key) and isinstance(value, list):  # numbers of layers
            value = [number for number in value if not isinstance(number, int) or number < len(kept)]
        if WIDTHS.fullmatch(key) or HEADS.fullmatch(key):
            smallest = 1 if HEADS.fullmatch(key) else None
            values_of_layers = value if isinstance(value, list) else [value]
            divided = [_divided(one, factor, smallest) for one in values_of_layers]
            value = divided if isinstance(value, list) else divided[0]
        setattr(config, key, value)
    config.num_hidden_layers = len(kept)  # under its name in this architecture


def _divided(value: Any, factor: int, smallest: int | None = None) -> Any:
    """Return a number divided by a factor, or `smallest` if it divides the factor; else the value as it is."""
    if not isinstance(value, int) or value <= 0:
        return value
    if smallest is not None and factor % value == 0:
        return smallest
    return value // factor if value % factor == 0 else value


def _random_model(hf_config: Any, config: ModelConfig, head: str | None) -> nn.Module:
    import transformers

    of_head = {None: auto_class(hf_config, None), "none": transformers.AutoModel}
    model_class = of_head.get(head, transformers.AutoModelForSequenceClassification)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"dtype": torch.float32, "trust_remote_code": config.trust_remote_code}
        return model_class.from_config(hf_config, **options).eval()


@torch.no_grad()
def _try(model: nn.Module) -> None:
    """Raise an error if a model does not compute finite numbers."""
    output = model(input_ids=torch.arange(N_TOKENS)[None])
    if not torch.isfinite(output[0]).all():
        raise ValueError("the outputs are not finite")


def _copy_other_files(config: ModelConfig, folder: Path) -> None:
    """Add the tokenizer, the generation config, and the code of a local model."""
    from transformers.utils.hub import cached_file

    load_tokenizer(config).save_pretrained(folder)
    options = {"revision": config.revision, "_raise_exceptions_for_missing_entries": False}
    generation = cached_file(config.name_or_path, "generation_config.json", **options)
    for file in (*Path(config.name_or_path).glob("*.py"), *([generation] if generation else [])):
        shutil.copy(file, folder)
