"""Answers to other prompts: each judged answer gets a second document, from which KTO estimates its KL.

This takes all files together, since the other answer has to be one to another prompt, and a file may hold one prompt
only or list its rows by prompt. So it comes after tokenizing, and is kept in caches of its own.
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
from .template import Tokens


def add_mismatched_answers(caches: list[TokenCache], config: Config) -> list[TokenCache]:
    """Return caches of the same examples, each with its prompt and an answer to another prompt as second document.

    Raises DataError when all rows have the same prompt, or when the folder of the caches cannot be written.
    """
    partners = choose_partners(np.concatenate([cache.doc_features["prompt"] for cache in caches]))  # [E]
    if partners is None:
        where = row_name(caches[0].source, caches[0].lines[0])
        raise DataError(
            f"{where}: all rows have the same prompt as this one, but kto needs "
            "answers to different prompts. Add rows with other prompts.",
            "unsuitable-data",
        )
    starts = np.cumsum([0, *map(len, caches)])
    settings = [FORMAT, config.max_length, [cache.key for cache in caches]]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:24]
    made = []
    for number, cache in enumerate(caches):
        path = cache.path.parent / f"{digest}-{number}.safetensors"
        found = usable_cache(path, cache.source, config)
        if found is None:
            _write(path, cache, caches, starts, partners[starts[number] : starts[number + 1]], config.max_length)
            found = TokenCache(path, cache.source)
        made.append(found)
    return made


def choose_partners(prompts: np.ndarray) -> np.ndarray | None:
    """Return for each example the number of one with another prompt -> [E] int64; None when all have the same.

    The k-th example of a prompt gets the k-th behind the last one of that prompt, with prompts in the order in which
    they come first. So where all prompts differ that is the next example, and where they have equally many examples
    each example is chosen once.
    """
    _, first, group, counts = np.unique(prompts, return_index=True, return_inverse=True, return_counts=True)
    if len(counts) == 1:
        return None
    by_appearance = np.argsort(first)
    counts = counts[by_appearance]
    group = np.argsort(by_appearance)[group]  # [E], numbered in the order in which they come first
    order = np.argsort(group, kind="stable")  # [E]
    stops = counts.cumsum()
    own = group[order]  # [E]
    within = np.arange(len(order)) - (stops - counts)[own]
    chosen = (stops[own] + within % (len(order) - counts[own])) % len(order)
    partners = np.empty_like(order)
    partners[order] = order[chosen]
    return partners


def _write(
    path: Path, cache: TokenCache, caches: list[TokenCache], starts: np.ndarray, partners: np.ndarray, max_length: int
) -> None:
    with new_cache(path, cache.source) as writer:
        writer.counts, writer.n_documents = cache.counts, 2
        for number, partner in enumerate(partners.tolist()):
            which = int(np.searchsorted(starts, partner, side="right")) - 1
            other = _tokens(caches[which], partner - int(starts[which]))
            writer.add(int(cache.lines[number]), _documents(_tokens(cache, number), other, max_length))


def _tokens(cache: TokenCache, number: int) -> Tokens:
    """The one document of an example, its ids and mask as arrays [T]."""
    (document,) = cache[number]
    values = {"desirable": document.doc_features["desirable"]}
    return Tokens(document.ids.numpy(), document.mask.numpy(), doc_features=values)


def _documents(judged: Tokens, other: Tokens, max_length: int) -> list[Tokens]:
    """The judged answer, and behind the same prompt the other one, whose end goes where it is too long."""
    prompt, answer = int(judged.mask.argmax()), int(other.mask.argmax())
    ids = np.concatenate([judged.ids[:prompt], other.ids[answer:]])[:max_length]
    mask = np.concatenate([judged.mask[:prompt], other.mask[answer:]])[:max_length]
    return [judged, Tokens(ids, mask, shared=prompt, doc_features=judged.doc_features)]
