"""Tokenize examples into documents, truncated to the maximum length, with the numbers that a loss needs."""

import dataclasses
import functools
import hashlib
import json
import math
from collections import Counter
from typing import NamedTuple

from minitrain.batch import TARGET_WEIGHTS
from minitrain.errors import DataError

from .counts import IDENTICAL, NO_TARGET_LEFT, TOO_LONG, UNREAD_ROW, count_uses, merge_uses
from .examples import (
    ClassificationExample,
    Conversation,
    Example,
    Preference,
    Prompt,
    Rollout,
    UnpairedPreference,
)
from .formats_scores import Ranking, Retrieval, Solution
from .messages import Messages, assistant, is_empty
from .shared_prefixes import merge_prefixes, n_shared, share_prefixes
from .template import Template
from .text_encoder import RenderedDocument, Tokens, check_texts

QUERY, POSITIVE, NEGATIVE = 0.0, 1.0, 2.0  # doc feature `role` of a text
STEP_LABEL = "step_label"  # token feature: the label of the step that ends with the token
EXCLUDED = "excluded"  # doc feature: 1 for a rollout that counts in its group's advantages, but is not trained on


class TruncationConfig(NamedTuple):
    """Limits on the length of an example, in tokens.

    Attributes:
        truncation: What to remove from a longer example: the oldest tokens of its `prompt`, its `end`, or everything
            (`drop`).
        mask_truncated: Do not train on rollouts whose sampling was cut off.
    """

    max_length: int
    truncation: str = "prompt"
    max_prompt_length: int | None = None
    mask_truncated: bool = False


def encode(example: Example, template: Template, limits: TruncationConfig) -> list[Tokens] | str:
    """Return the documents of an example, or why it is dropped.

    Raises:
        DataError: The example cannot be encoded; the caller adds file and line.
    """
    return tokenize(example, render(example, template), template, limits)


def render(example: Example, template: Template) -> list[RenderedDocument]:
    """Return the documents of an example before they are tokenized; none if `tokenize` needs none.

    Raises:
        DataError: As `encode`.
    """
    if isinstance(example, Preference):
        return [_render_pair(example, response, template) for response in (example.chosen, example.rejected)]
    if isinstance(example, UnpairedPreference):
        return [_render_pair(example, example.response, template)]
    if isinstance(example, Rollout) and isinstance(example.response, str):
        messages = [*example.prompt, assistant(example.response)]
        return [template.render(Conversation(messages, variables=example.variables), 1)]
    if isinstance(example, Conversation):
        check_no_empty_responses(example.messages, template.trained_turns(example.messages))
        return (
            template.render_turns(example) if template.targets.train_on == "each_turn" else [template.render(example)]
        )
    return []


def tokenize(
    example: Example, rendered: list[RenderedDocument], template: Template, limits: TruncationConfig
) -> list[Tokens] | str:
    """Return the documents of an example that `render` rendered, or why it is dropped.

    Raises:
        DataError: As `encode`.
    """
    documents = [template.encoder.join(document) for document in rendered]
    if isinstance(example, Preference):
        return _preference(example, documents, template, limits)
    if isinstance(example, UnpairedPreference):
        return _unpaired(example, documents, template, limits)
    if isinstance(example, ClassificationExample):
        return _classification(example, template, limits)
    if isinstance(example, Retrieval):
        return _retrieval(example, template, limits)
    if isinstance(example, Solution):
        return _solution(example, template, limits)
    if isinstance(example, Rollout):
        return _rollout(example, documents, template, limits)
    if isinstance(example, Prompt):
        ids = template.encode_prompt(example.messages, example.variables)
        is_too_long = len(ids) >= limits.max_length or len(ids) > (limits.max_prompt_length or len(ids))
        return TOO_LONG if is_too_long else [Tokens(ids, [False] * len(ids))]
    if isinstance(example, Conversation) and template.targets.train_on == "each_turn":
        return _each_turn(documents, template, limits)
    return truncate(documents or [template.encode(example)], limits, template.tokenizer.bos_token_id)


def count_example(example: Example, documents: list[Tokens], template: Template) -> Counter:
    """Return the counts of an example: what was done with its documents, its fields, and keys that nothing reads."""
    counts: Counter = Counter()
    for document in documents:
        counts |= Counter(document.counts)  # the larger of each
    uses = functools.reduce(merge_uses, (document.uses for document in documents))
    unread = [*example.unread, *template.unread_variables(example)]
    if uses or unread:  # few rows have any, and counters are slow
        counts += count_uses(uses) + Counter(UNREAD_ROW + key for key in unread)
    return counts


def check_no_empty_responses(messages: Messages, trained: list[int]) -> None:
    """Raise DataError if an assistant turn that is trained on is empty or white space.

    Args:
        trained: Indices of the turns that are trained on.
    """
    for i in trained:
        if is_empty(messages[i]):
            raise DataError(f"turn {i + 1} of {len(messages)} is an empty response, without a target", "no-answer")


def _each_turn(turns: list[Tokens], template: Template, limits: TruncationConfig) -> list[Tokens] | str:
    """Return the documents of responses, as at inference, each truncated as if it were the only one."""
    documents, reasons = [], []
    for document in turns:
        truncated = truncate([document], limits, template.tokenizer.bos_token_id)
        if isinstance(truncated, str):
            reasons.append(truncated)
        else:
            documents += truncated
    if not documents:
        return reasons[0]
    counts = Counter({"dropped-responses": len(reasons)})
    for document in documents:
        counts.update(document.counts)
        document.counts = {}
    counts["truncated"] = min(counts["truncated"], 1)  # of examples
    documents = share_prefixes(merge_prefixes(documents))
    documents[0].counts = dict(+counts)
    return documents


def _preference(
    example: Preference, documents: list[Tokens], template: Template, limits: TruncationConfig
) -> list[Tokens] | str:
    """Return the chosen document, then the rejected one."""
    _check_weights(documents)
    if _are_identical(documents):
        raise DataError("chosen and rejected are the same in the chat template", "same-answers")
    for document in documents:
        document.doc_features["margin"] = example.margin
    rejected, n = documents[1], len(example.prompt)
    rejected.uses = {(i if i < n else i + len(example.chosen), name): key for (i, name), key in rejected.uses.items()}
    documents = truncate(documents, limits, template.tokenizer.bos_token_id)
    if isinstance(documents, str):
        return documents
    return IDENTICAL if _are_identical(documents) else _with_shared(documents)


def _unpaired(
    example: UnpairedPreference, documents: list[Tokens], template: Template, limits: TruncationConfig
) -> list[Tokens] | str:
    """Return the labeled response, with a hash of its prompt, for which `mismatched.py` adds another response."""
    _check_weights(documents)
    (document,) = documents
    document.doc_features |= {"desirable": float(example.desirable), "prompt": _prompt_hash(example.prompt)}
    return truncate([document], limits, template.tokenizer.bos_token_id)


def _prompt_hash(prompt: Messages) -> float:
    """Return a hash that is the same in every process and run."""
    digest = hashlib.blake2b(json.dumps(prompt).encode(), digest_size=8).digest()
    return float(int.from_bytes(digest, "big") >> 12)  # as many bits as float64 holds


def _are_identical(documents: list[Tokens]) -> bool:
    """Return whether both documents of a pair are the same, so that their comparison has no gradient."""
    first, second = documents
    return first.ids == second.ids and first.mask == second.mask


def _render_pair(example: Preference | UnpairedPreference, response: Messages, template: Template) -> RenderedDocument:
    messages = example.prompt + response
    n_trained = sum(message["role"] == "assistant" for message in response)
    check_no_empty_responses(messages, template.trained_turns(messages, n_trained))
    return template.render(Conversation(messages, variables=example.variables), n_trained)


def _check_weights(documents: list[Tokens]) -> None:
    if any(TARGET_WEIGHTS in document.token_features for document in documents):
        raise DataError("a turn has a weight other than 0 and 1, which this loss does not use. Remove it", "no-effect")


def _with_shared(documents: list[Tokens]) -> list[Tokens]:
    """Set the number of leading prompt tokens that the second document has in common with the first."""
    first, second = documents
    second.shared = n_shared(first, second, min(first.mask.index(True), second.mask.index(True)))
    return documents


def _solution(example: Solution, template: Template, limits: TruncationConfig) -> list[Tokens] | str:
    """Return the prompt and the steps. The targets are the last tokens of the steps with a label.

    Each step is tokenized with its separator, by itself.
    """
    check_texts([*example.steps, example.separator])
    ids = template.encode_prompt(example.prompt, example.variables)
    mask, labels = [False] * len(ids), [math.nan] * len(ids)
    for step, label in zip(example.steps, example.labels, strict=True):
        text = template.encoder.mark_literals(step + example.separator)
        piece = template.encoder.encode_text(text, before="a" if any(mask) else "")
        ids, mask, labels = ids + piece, mask + [True] * len(piece), labels + [math.nan] * len(piece)
        labels[-1] = label
    tokens = Tokens(ids, mask, token_features={STEP_LABEL: labels})
    documents = truncate([tokens], limits, template.tokenizer.bos_token_id)
    if isinstance(documents, str):
        return documents
    (tokens,) = documents
    tokens.mask = [not math.isnan(label) for label in tokens.token_features[STEP_LABEL]]
    tokens.token_features[STEP_LABEL] = [
        0.0 if math.isnan(label) else label for label in tokens.token_features[STEP_LABEL]
    ]
    return documents if any(tokens.mask) else NO_TARGET_LEFT


def _classification(example: ClassificationExample, template: Template, limits: TruncationConfig) -> list[Tokens] | str:
    texts = [example.text] if example.text_pair is None else [example.text, example.text_pair]
    tokens = _texts(texts, template, limits)
    if tokens is None:
        return TOO_LONG
    tokens.doc_features["label"] = example.label
    return [tokens]


def _retrieval(example: Retrieval, template: Template, limits: TruncationConfig) -> list[Tokens] | str:
    """Return the query, the positive and the negatives, or each pair of the query with one of those."""
    answers = [example.positive, *example.negatives]
    texts = [[example.query, text] for text in answers]
    roles = [POSITIVE, *[NEGATIVE] * len(example.negatives)]
    if not isinstance(example, Ranking):
        texts, roles = [[text] for text in (example.query, *answers)], [QUERY, *roles]
    documents = [_texts(each, template, limits) for each in texts]
    if None in documents:
        return TOO_LONG
    for document, role, each in zip(documents, roles, texts, strict=True):
        document.doc_features |= {"role": role, "text": _text_hash(each[-1]), "query": _text_hash(example.query)}
    return documents


def _texts(texts: list[str], template: Template, limits: TruncationConfig) -> Tokens | None:
    """Return one or two texts as the tokenizer encodes them, without targets; None if they are too long."""
    check_texts(texts)
    encoded, counts = template.tokenizer(*texts), {}
    if len(encoded["input_ids"]) > limits.max_length:
        if limits.truncation == "drop":
            return None
        counts = {"truncated": 1}
        encoded = template.tokenizer(*texts, truncation=True, max_length=limits.max_length)
    ids = encoded["input_ids"]
    if not ids:
        raise DataError("the text is empty", "invalid-row")
    types = {"token_types": encoded.get("token_type_ids", [0] * len(ids))}
    return Tokens(ids, [False] * len(ids), counts, token_features=types)


def _text_hash(text: str) -> float:
    """Return a hash that is exact in float32, the same in every process and run."""
    return float(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=3).digest(), "big"))


def _rollout(example: Rollout, documents: list[Tokens], template: Template, limits: TruncationConfig) -> list[Tokens]:
    """Return the full rollout: with a truncated prompt, its logps would differ from those in the row.

    A rollout longer than max_length is excluded from training but not dropped, because its reward counts in the mean
    of its group (open-instruct#1794). With `mask_truncated`, this also holds if its sampling was cut off.
    """
    tokens, truncated = _rollout_tokens(example, documents, template, limits.mask_truncated)
    excluded = ""
    if len(tokens.ids) > limits.max_length:
        excluded = "long-rollouts"
    elif limits.mask_truncated and truncated:
        excluded = "truncated-rollouts"
    if excluded:
        tokens.counts = tokens.counts | {excluded: 1}
    n = sum(tokens.mask)
    for name, numbers in example.tokens.items():
        numbers = numbers * n if len(numbers) == 1 and name in ("advantages", "returns") else numbers
        if len(numbers) != n:
            raise DataError(
                f"{name}: expected {n} numbers, one per response token with the end token, got {len(numbers)}. "
                "Provide prompt_ids and response_ids, the tokens as they were sampled",
                "invalid-row",
            )
        remaining = iter(numbers)
        tokens.token_features[name] = [next(remaining) if is_target else 0.0 for is_target in tokens.mask]
    prompt_ids = tuple(tokens.ids[: tokens.mask.index(True)])
    tokens.doc_features |= {"reward": example.reward, "group": float(hash(prompt_ids) % (1 << 52))}
    tokens.doc_features[EXCLUDED] = float(bool(excluded))
    return [tokens]


def _rollout_tokens(
    example: Rollout, documents: list[Tokens], template: Template, infer_truncated: bool
) -> tuple[Tokens, bool]:
    """Return the tokens of a rollout, and whether its sampling was cut off.

    A string counts as complete unless the row has `truncated: true`; then it gets no end token.

    Args:
        infer_truncated: If the row does not say so, take ids without an end token as cut off.
    """
    if not isinstance(example.response, str):
        prompt, response = example.prompt, example.response
        _check_ids([*prompt, *response], len(template.tokenizer))
        tokens = Tokens([*prompt, *response], [False] * len(prompt) + [True] * len(response))
        if example.truncated is None and infer_truncated:
            return tokens, response[-1] not in template.end_ids()
        return tokens, bool(example.truncated)
    (tokens,) = documents
    if example.truncated and tokens.ids[-1] in template.end_ids() and sum(tokens.mask) > 1:
        tokens.ids.pop()
        tokens.mask.pop()
    return tokens, bool(example.truncated)


def _check_ids(ids: list[int], n_tokens: int) -> None:
    if max(ids) >= n_tokens:
        raise DataError(
            f"expected token ids below {n_tokens}, the size of the tokenizer, got {max(ids)}", "invalid-row"
        )


def truncate(documents: list[Tokens], limits: TruncationConfig, bos_token_id: int | None) -> list[Tokens] | str:
    """Return the documents of one example, truncated to `max_length` tokens, or why the example is dropped.

    `truncation=prompt` removes the same number of the oldest prompt tokens from each document and keeps BOS. If the
    last response alone is too long, its end is removed, too.
    """
    if max(len(d.ids) for d in documents) <= limits.max_length and limits.max_prompt_length is None:
        return documents if all(any(d.mask) for d in documents) else NO_TARGET_LEFT
    # The start of the last response; one token before it has to stay, to predict its first token.
    starts = [len(d.mask) - d.mask[::-1].index(False) for d in documents]
    excess = max(len(d.ids) for d in documents) - limits.max_length
    prompt_excess = max(starts) - limits.max_prompt_length if limits.max_prompt_length else 0
    if limits.truncation == "drop" and max(excess, prompt_excess) > 0:
        return TOO_LONG
    n_removed = max(0, prompt_excess, excess if limits.truncation == "prompt" else 0)
    n_removed = min(n_removed, min(starts) - 1)
    shortened = [_shorten(document, n_removed, limits.max_length, bos_token_id) for document in documents]
    return shortened if all(any(d.mask) for d in shortened) else NO_TARGET_LEFT


def _shorten(tokens: Tokens, n_removed: int, max_length: int, bos_token_id: int | None) -> Tokens:
    """Return the document without `n_removed` tokens after BOS, and truncated at the end to `max_length`."""
    if not n_removed and len(tokens.ids) <= max_length:
        return tokens
    n_bos = 1 if tokens.ids[0] == bos_token_id else 0
    ids = (tokens.ids[:n_bos] + tokens.ids[n_bos + n_removed :])[:max_length]
    mask = (tokens.mask[:n_bos] + tokens.mask[n_bos + n_removed :])[:max_length]
    features = {
        name: (feature[:n_bos] + feature[n_bos + n_removed :])[:max_length]
        for name, feature in tokens.token_features.items()
    }
    counts = tokens.counts | {"truncated": 1}
    return dataclasses.replace(tokens, ids=ids, mask=[False, *mask[1:]], counts=counts, token_features=features)
