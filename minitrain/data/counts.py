"""What is counted while rows are tokenized, and the words for it."""

from collections import Counter
from collections.abc import Mapping

BAD_ROWS = "bad-rows"  # the count that max_bad_rows limits
# Why an example is dropped.
TOO_LONG, NO_TARGET_LEFT, IDENTICAL = "too-long", "no-target-left", "same-answers"
# Keys of TokenCache.counts, with the words for each.
DROPPED = {
    BAD_ROWS: "bad rows skipped",
    TOO_LONG: "examples dropped (longer than max_length)",
    NO_TARGET_LEFT: "examples dropped (no target left after truncation)",
    IDENTICAL: "examples dropped (chosen and rejected are the same after truncation)",
}
OF_ROWS = DROPPED | {
    "truncated": "truncated examples",
    "long-rollouts": "rollouts longer than max_length, not trained on",
    "truncated-rollouts": "truncated rollouts, not trained on",
}
COUNTED = OF_ROWS | {
    "dropped-responses": "responses dropped (longer than max_length, or no target left after truncation)",
    "dropped-turns": "turns after the last response that is trained on, not used",
    "empty-thoughts": "responses without reasoning, trained on with an empty thought (if the chat template knows "
    "enable_thinking, chat_template_kwargs={enable_thinking: false} moves it into the prompt)",
    "other-prompts": "responses after another prompt than at inference (train_on=each_turn avoids this)",
    "literal-tokens": "special tokens in user and tool turns, tokenized as ordinary text",
}
# Beginnings of keys: a field that the text does not have, a key of a turn or of a row that nothing reads.
LOST, UNREAD, UNREAD_ROW = "lost:", "unread:", "unread-row:"
# What rows may have besides text. `rows:FIELD` counts the rows, `FIELD:USE` what becomes of each.
ROWS = "rows:"
FIELDS = {
    "tools": "tools",
    "documents": "documents",
    "calls": "tool calls",
    "results": "tool results",
    "reasoning": "reasoning",
    "weights": "weights",
}
TRAINED, UNTRAINED, PROMPT, UNUSED = "trained", "untrained", "prompt", "unused"
USES = {TRAINED: "trained on", UNTRAINED: "not trained on", PROMPT: "in the prompt", UNUSED: "not used"}

Uses = dict[tuple[int, str], str]  # (turn, or -1; one field of it) -> the key that counts it


def merge_uses(uses: Uses, others: Uses) -> Uses:
    """Return what becomes of each field in two documents: what is trained on in one of them is trained on."""
    merged = uses | others
    return merged | {field: min(key, others[field], key=_rank) for field, key in uses.items() if field in others}


def _rank(key: str) -> int:
    use = key.partition(":")[2]
    return [*USES].index(use) if use in USES else 0


def count_uses(uses: Uses) -> Counter:
    """Return the counts of one row."""
    counts = Counter(uses.values())
    used = {key.partition(":")[0] for key in counts}
    return counts + Counter(ROWS + field for field in FIELDS if field in used)


def describe_counts(counts: Mapping[str, int], n_rows: int) -> list[str]:
    """Return a line for each count of skipped, dropped or truncated rows, with its fraction of `n_rows`."""
    lines = [f"{n:,} {COUNTED[key]}{of_rows(key, n, n_rows)}" for key, n in counts.items() if key in COUNTED]
    return lines + [
        f"{n:,} times {key.removeprefix(LOST)} is not in the text of the chat template"
        for key, n in counts.items()
        if key.startswith(LOST)
    ]


def of_rows(key: str, n: int, n_rows: int) -> str:
    """Return a count's fraction of the rows; nothing for turns, of which a row can have several."""
    return "" if key not in OF_ROWS else f" of {n_rows:,} ({100 * n / n_rows:.1f}%)"


def describe_fields(counts: Mapping[str, int]) -> str:
    """Return what rows have besides text, and what becomes of it, in words; empty if they have nothing else."""
    phrases = []
    for field, words in FIELDS.items():
        if n_rows := counts.get(ROWS + field):
            uses = [f"{counts[key]:,} {words}" for use, words in USES.items() if (key := f"{field}:{use}") in counts]
            phrases.append(f"{words} in {n_rows:,} {'rows' if n_rows > 1 else 'row'}: {', '.join(uses)}")
    return "; ".join(phrases)


def describe_unread(counts: Mapping[str, int]) -> str:
    """Return the keys that nothing reads, in words; empty if all are read."""
    phrases = []
    for beginning, owner in ((UNREAD_ROW, "rows"), (UNREAD, "turns")):
        keys = [f"{key.removeprefix(beginning)} ({n:,})" for key, n in counts.items() if key.startswith(beginning)]
        phrases += [f"keys of {owner} that are not used: {', '.join(keys)}"] if keys else []
    return "; ".join(phrases)
