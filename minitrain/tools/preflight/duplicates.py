"""Find training examples that occur twice, and evaluation examples that are in the training data, by their tokens."""

from typing import NamedTuple

import numpy as np

from minitrain.data.cache import TokenCache
from minitrain.data.loader import TokenizedDataset

BLOCK_TOKENS = 1 << 20  # hashed at once, in about 60 MB
MAX_NAMED = 3


class Hashes(NamedTuple):
    """Hashes of examples.

    Attributes:
        examples: Of the ids and the mask of all documents, uint64, shape [E].
        prompts: Of the ids before the first target, uint64, shape [E]; 0 for an example without a prompt.
    """

    examples: np.ndarray
    prompts: np.ndarray


class Matches(NamedTuple):
    """Pairs of equal examples: `indices[i]` equals `originals[i]`."""

    indices: np.ndarray
    originals: np.ndarray


def describe_duplicates(train: TokenizedDataset, evaluation: TokenizedDataset | None, kind: str) -> dict[str, str]:
    """Return what is found, in words, by `duplicates`, `leaks` and `same prompts`; "none" where nothing is.

    Args:
        kind: The kind of examples. Of a response with a label, the partner that `mismatched.py` chose does not count.
    """
    data = [train] if evaluation is None else [train, evaluation]
    caches = {id(cache): cache for dataset in data for cache in dataset.caches}
    hashes = {key: hash_examples(cache, kind == "unpaired_preference") for key, cache in caches.items()}
    train_hashes = _select(train, hashes)
    found = find_repeated(train_hashes.examples)
    text = f"{len(found.indices):,} of {len(train):,} training examples repeat an earlier one"
    lines = {"duplicates": _name(text, found, train, train)}
    if evaluation is not None:
        eval_hashes = _select(evaluation, hashes)
        found = find_common(eval_hashes.examples, train_hashes.examples)
        text = f"{len(found.indices):,} of {len(evaluation):,} evaluation examples are in the training data"
        lines["leaks"] = _name(text, found, evaluation, train)
        others = find_common(eval_hashes.prompts, train_hashes.prompts)
        is_other = (eval_hashes.prompts[others.indices] != 0) & ~np.isin(others.indices, found.indices)
        others = Matches(*(column[is_other] for column in others))
        if len(others.indices):
            text = f"{len(others.indices):,} other evaluation examples have the prompt of a training example"
            lines["same prompts"] = _name(text, others, evaluation, train)
    return lines


def hash_examples(cache: TokenCache, first_only: bool = False) -> Hashes:
    """Return the hashes of all examples of a cache, with a block of its tokens in memory at a time.

    Args:
        first_only: Hash only the first document of each example.
    """
    bounds, blocks, start = cache.bounds, [], 0
    while start < len(cache):
        stop = int(np.searchsorted(bounds, bounds[start] + BLOCK_TOKENS, side="right")) - 1
        stop = max(stop, start + 1)
        blocks.append(_hash_block(cache, start, stop, first_only))
        start = stop
    empty = np.empty(0, np.uint64)
    return Hashes(*(np.concatenate([empty, *column]) for column in zip(*blocks)))


def _hash_block(cache: TokenCache, start: int, stop: int, first_only: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes of the examples from `start` to `stop`: sums over tokens of hashes of id, place and mask."""
    documents = cache.first_documents[start : stop + 1]  # [E + 1]
    offsets = cache.offsets[documents[0] : documents[-1] + 1]  # [D + 1]
    begin, end = offsets[0], offsets[-1]
    numbers = np.arange(documents[0], documents[-1]) - np.repeat(documents[:-1], np.diff(documents))  # [D] in example
    lengths = np.diff(offsets)  # [D]
    places = np.arange(begin, end) - np.repeat(offsets[:-1] - (numbers << 24), lengths)  # [T]
    tokens = cache.ids.numpy()[begin:end].astype(np.uint64) | (places.astype(np.uint64) << np.uint64(32))  # [T]
    tokens, mask = _mix(tokens), cache.mask.numpy()[begin:end]
    sums = _running_sums(tokens)  # [T + 1]; differences are the sums of spans, also after an overflow
    target_sums = _running_sums(tokens * mask)  # [T + 1]
    firsts = cache.offsets[documents[:-1]] - begin  # [E]
    first_ends = cache.offsets[documents[:-1] + 1] - begin  # [E]
    ends = first_ends if first_only else cache.offsets[documents[1:]] - begin
    examples = sums[ends] - sums[firsts] + np.uint64(3) * (target_sums[ends] - target_sums[firsts])
    targets = np.append(np.flatnonzero(mask), end - begin)
    prompt_ends = targets[np.searchsorted(targets, firsts)]  # [E]
    has_prompt = (prompt_ends < first_ends) & (prompt_ends > firsts + 1)  # a text has only its first token before them
    return examples, np.where(has_prompt, sums[prompt_ends] - sums[firsts], np.uint64(0))


def _mix(numbers: np.ndarray) -> np.ndarray:
    """Return hashes of uint64 numbers, in place (the finalizer of SplitMix64)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        numbers ^= numbers >> np.uint64(shift)
        numbers *= np.uint64(factor)
    return numbers


def _running_sums(numbers: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.uint64), np.cumsum(numbers, dtype=np.uint64)])


def _select(dataset: TokenizedDataset, hashes: dict[int, Hashes]) -> Hashes:
    pairs = [(hashes[id(cache)], indices) for cache, indices in zip(dataset.caches, dataset.selected, strict=True)]
    return Hashes(*(np.concatenate([each[i][indices] for each, indices in pairs]) for i in range(2)))


def find_repeated(hashes: np.ndarray) -> Matches:
    """Return the examples that are equal to an earlier one."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    originals = first[inverse]  # [E]
    indices = np.flatnonzero(originals != np.arange(len(hashes)))
    return Matches(indices, originals[indices])


def find_common(hashes: np.ndarray, others: np.ndarray) -> Matches:
    """Return the examples that are among the others."""
    known, first = np.unique(others, return_index=True)
    positions = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    indices = np.flatnonzero(known[positions] == hashes)
    return Matches(indices, first[positions[indices]])


def _name(text: str, matches: Matches, dataset: TokenizedDataset, originals: TokenizedDataset) -> str:
    """Return the text with the first examples; "none" if there are no matches."""
    if not len(matches.indices):
        return "none"
    pairs = zip(matches.indices[:MAX_NAMED].tolist(), matches.originals[:MAX_NAMED].tolist(), strict=True)
    names = [f"{dataset.where(i)} like {originals.where(j)}" for i, j in pairs]
    return f"{text}: {', '.join(names)}{', ...' if len(matches.indices) > MAX_NAMED else ''}"
