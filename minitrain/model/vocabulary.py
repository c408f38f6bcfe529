"""Tokens that are new to a model, and the initial values of their embedding rows.

A new row is the mean of the known rows (Hewitt 2021) plus a little noise: with equal rows, two tokens would have the
same probability. The noise depends only on the token id, so that the policy, its reference, every rank and a later
merge have the same row.
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from minitrain.errors import ConfigError

from .weights import Weights

NOISE = 0.1  # standard deviation, relative to that of the known rows


def mark_known(tokenizer) -> None:
    """Record the ids of a loaded tokenizer, so that tokens added later count as new."""
    tokenizer.known = frozenset(tokenizer.get_vocab().values())


def count_ids(tokenizer) -> int:
    """Return one more than the largest token id, which exceeds `len(tokenizer)` if the ids have gaps.

    Raises:
        ConfigError: Two tokens have the same id, which happens if a token is added to a tokenizer with gaps.
    """
    vocabulary = tokenizer.get_vocab()
    tokens: dict[int, str] = {}
    for token, number in vocabulary.items():
        first = tokens.setdefault(number, token)
        if first != token:
            raise ConfigError(
                f"model.tokenizer_name_or_path: the tokens {first!r} and {token!r} have the same id, got {number}. "
                "The ids of this tokenizer have gaps. Add the token to its tokenizer.json with an unused id.",
                "unsupported-model",
            )
    return max(tokens) + 1


def resize_embeddings(model: nn.Module, tokenizer, weights: Weights | None = None) -> None:
    """Add embedding rows until every token id has one, and initialize those of new tokens. Never remove rows.

    New ids are those beyond the model's rows, and those of tokens added since the tokenizer was loaded, even if the
    model has an unused row for them. `model.new_ids` lists the trained ones: all except padding.

    Args:
        model: The transformers model.
        tokenizer: The tokenizer that the model is trained with.
        weights: Weights of a model on the meta device.
    """
    n_rows, n_ids = model.get_input_embeddings().weight.shape[0], count_ids(tokenizer)
    ids = set(tokenizer.get_vocab().values())
    added = ids - getattr(tokenizer, "known", ids)  # without mark_known, no token counts as added
    new = sorted(added | set(range(n_rows, n_ids)))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id != tokenizer.eos_token_id else None
    model.new_ids = [number for number in new if number != padding]
    if n_ids > n_rows:
        model.resize_token_embeddings(n_ids, mean_resizing=False)
    if not new:
        return
    for name, parameter in embedding_parameters(model).items():
        if weights is not None:
            rows = NewRows(weights.sources[name], weights.sizes[name][0], new)
            weights.sources[name], weights.sizes[name] = rows, list(parameter.shape)
        elif not parameter.is_meta:
            with torch.no_grad():
                parameter[new] = NewRows(parameter[:n_rows], n_rows, new).start(new).to(parameter.dtype)


def embedding_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the input embeddings and the LM head by name, if the model has them."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    return {name: module for name, module in model.named_modules() if any(module is layer for layer in layers)}


def embedding_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights and biases of embeddings and LM head by name, tied ones once."""
    layers = embedding_layers(model).values()
    parameter_ids = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in parameter_ids}


class NewRows:
    """The rows of a tensor, followed by or mixed with rows of new tokens.

    Args:
        source: The known rows, as `source[start:stop]`.
        n_rows: Number of known rows.
        ids: Ids of new tokens.
    """

    def __init__(self, source: Any, n_rows: int, ids: list[int]):
        self.source, self.n_rows, self.ids = source, n_rows, ids

    def __getitem__(self, rows: slice) -> Tensor:
        known = self.source[rows.start : min(rows.stop, self.n_rows)]
        ids = [number for number in self.ids if rows.start <= number < rows.stop]
        if not ids:
            return known
        rows_with_new = known.new_empty(rows.stop - rows.start, *known.shape[1:])
        rows_with_new[: len(known)] = known
        rows_with_new[[number - rows.start for number in ids]] = self.start(ids).to(known.dtype)
        return rows_with_new

    def start(self, ids: list[int]) -> Tensor:
        """Return the initial rows of the tokens `ids` in float32, shape [n, H]."""
        mean, deviation = self._moments
        noise = [torch.randn(mean.shape, generator=torch.Generator().manual_seed(number)) for number in ids]
        return mean + NOISE * deviation * torch.stack(noise)

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        known = self.source[: self.n_rows].float()
        return known.mean(0), known.std(0, correction=0)


def describe_new_tokens(model: nn.Module, tokenizer) -> str | None:
    """Return a line about the new tokens and how they are trained; None without any."""
    if not model.new_ids:
        return None
    names = [str(tokenizer.convert_ids_to_tokens(number)) for number in model.new_ids[:4]]
    more = f" and {len(model.new_ids) - 4:,} more" if len(model.new_ids) > 4 else ""
    only_rows = any(name.endswith("token_rows") for name, _ in model.named_parameters())
    how = "only their rows are trained, the others are frozen" if only_rows else "their rows are trained"
    return f"{', '.join(names)}{more}, which are new to the model: {how}"
