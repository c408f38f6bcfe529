"""Pair each labeled response with a response to another prompt, from which KTO estimates its KL.

The other response comes from any data file, because a file may hold a single prompt. So the pairs are made after all
files are tokenized, and have their own caches.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from minitrain.config.schema import Config
from minitrain.errors import DataError

from .cache import FORMAT, TokenCache, usable_cache
from .cache_writer import new_cache
from .source import row_name
from .text_encoder import Tokens


def add_mismatched_responses(caches: list[TokenCache], config: Config) -> list[TokenCache]:
    """Return caches of the same examples whose second document is the prompt with a response to another prompt.

    Raises:
        DataError: All rows have the same prompt, or the cache directory cannot be written.
    """
    partners = choose_partners(np.concatenate([cache.doc_features["prompt"] for cache in caches]))  # [E]
    if partners is None:
        where = row_name(caches[0].source, caches[0].lines[0])
        raise DataError(
            f"{where}: all rows have the same prompt as this one, but kto needs responses to different prompts. "
            "Add rows with other prompts.",
            "unsuitable-data",
        )
    starts = np.cumsum([0, *map(len, caches)])
    settings = [FORMAT, config.max_length, [cache.key for cache in caches]]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:24]
    mismatched = []
    for number, cache in enumerate(caches):
        path = cache.path.parent / f"{digest}-{number}.safetensors"
        result = usable_cache(path, cache.source, config)
        if result is None:
            _write(path, cache, caches, starts, partners[starts[number] : starts[number + 1]], config.max_length)
            result = TokenCache.open(path, cache.source)
        mismatched.append(result)
    return mismatched


def choose_partners(prompts: np.ndarray) -> np.ndarray | None:
    """Return for each example the index of one with another prompt, or None if all have the same prompt.

    The examples are grouped by prompt, in order of first appearance. The k-th example of a group gets the k-th example
    after the end of that group. If all prompts differ, this is the next example. If all groups have the same size, each
    example is used once.

    Args:
        prompts: A number per example that identifies its prompt, shape [E].

    Returns:
        Indices, shape [E], int64.
    """
    _, first, group, counts = np.unique(prompts, return_index=True, return_inverse=True, return_counts=True)
    if len(counts) == 1:
        return None
    by_appearance = np.argsort(first)
    counts = counts[by_appearance]
    group = np.argsort(by_appearance)[group]  # [E], numbered by first appearance
    order = np.argsort(group, kind="stable")  # [E]
    stops = counts.cumsum()
    group = group[order]  # [E], ascending
    within = np.arange(len(order)) - (stops - counts)[group]  # [E]
    partner = (stops[group] + within % (len(order) - counts[group])) % len(order)  # [E]
    partners = np.empty_like(order)
    partners[order] = order[partner]
    return partners


def _write(
    path: Path, cache: TokenCache, caches: list[TokenCache], starts: np.ndarray, partners: np.ndarray, max_length: int
) -> None:
    with new_cache(path, cache.source) as writer:
        writer.counts = cache.counts
        for number, partner in enumerate(partners.tolist()):
            file = int(np.searchsorted(starts, partner, side="right")) - 1
            other = _tokens(caches[file], partner - int(starts[file]))
            writer.add(int(cache.lines[number]), _documents(_tokens(cache, number), other, max_length))


def _tokens(cache: TokenCache, number: int) -> Tokens:
    """Return the only document of an example, with ids and mask as arrays [T]."""
    (document,) = cache[number]
    doc_features = {"desirable": document.doc_features["desirable"]}
    return Tokens(document.ids.numpy(), document.mask.numpy(), doc_features=doc_features)


def _documents(labeled: Tokens, other: Tokens, max_length: int) -> list[Tokens]:
    """Return the labeled document, and its prompt with the other response, truncated at the end."""
    n_prompt, start = int(labeled.mask.argmax()), int(other.mask.argmax())
    ids = np.concatenate([labeled.ids[:n_prompt], other.ids[start:]])[:max_length]
    mask = np.concatenate([labeled.mask[:n_prompt], other.mask[start:]])[:max_length]
    return [labeled, Tokens(ids, mask, shared=n_prompt, doc_features=labeled.doc_features)]
