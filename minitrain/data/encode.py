"""Records -> documents: one for each text that the model reads, cut to length, with the numbers that go with it."""

import hashlib
import json
from typing import NamedTuple

from minitrain.errors import DataError

from .examples import (
    ClassificationExample,
    Conversation,
    Messages,
    Preference,
    Record,
    Rollout,
    UnpairedPreference,
    assistant,
)
from .template import Template, Tokens, refuse_unusable

N_DOCUMENTS = {  # of an example
    "conversation": 1,
    "preference": 2,
    "unpaired_preference": 1,
    "classification": 1,
    "rollout": 1,
}
TOO_LONG, NOTHING_LEFT, ALIKE = "too-long", "nothing-left", "same-answers"  # why an example is left out
EXCLUDED = "excluded"  # the value of documents that are not trained on, and only take part in what is made of all files


class TruncationConfig(NamedTuple):
    """`truncation`: what a longer example loses: the oldest of its `prompt`, its `end`, or (`drop`) all of it.

    `mask_truncated`: train on no rollout whose sampling was cut off.
    """

    max_length: int
    truncation: str = "prompt"
    max_prompt_length: int | None = None
    mask_truncated: bool = False


def encode(record: Record, template: Template, limits: TruncationConfig) -> list[Tokens] | str:
    """The documents of a record, or why nothing of it is left. Raises DataError for what cannot be encoded."""
    if isinstance(record, Preference):
        return _preference(record, template, limits)
    if isinstance(record, UnpairedPreference):
        return _feedback(record, template, limits)
    if isinstance(record, ClassificationExample):
        return _labelled(record, template, limits)
    if isinstance(record, Rollout):
        return _rollout(record, template, limits)
    if isinstance(record, Conversation):
        refuse_empty_answers(record.messages, 1 if template.train_on == "last_turn" else None)
    return truncate([template.encode(record)], limits, template.tokenizer.bos_token_id)


def refuse_empty_answers(messages: Messages, n_learned: int | None = None) -> None:
    """Raise DataError when an answer that is trained on is empty or only white space: it would teach to say nothing.

    Args:
        n_learned: How many answers are trained on, counted from the last one; None for all.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in answers[-n_learned:] if n_learned else answers:
        if not messages[i]["content"].strip():
            raise DataError(
                f"turn {i + 1} of {len(messages)} is an empty answer, so there is nothing to learn", "no-answer"
            )


def _preference(record: Preference, template: Template, limits: TruncationConfig) -> list[Tokens] | str:
    """The chosen document, then the rejected one."""
    documents = [_continued(record.prompt, continuation, template) for continuation in (record.chosen, record.rejected)]
    if _alike(documents):
        raise DataError("chosen and rejected are the same in the chat template", "same-answers")
    for document in documents:
        document.doc_features["margin"] = record.margin
    documents = truncate(documents, limits, template.tokenizer.bos_token_id)
    if isinstance(documents, list) and _alike(documents):
        return ALIKE
    return _sharing(documents)


def _feedback(record: UnpairedPreference, template: Template, limits: TruncationConfig) -> list[Tokens] | str:
    """The answer that was judged, with a number that stands for its prompt; `mismatched.py` adds another answer."""
    document = _continued(record.prompt, record.response, template)
    document.doc_features |= {"desirable": float(record.desirable), "prompt": _number_of(record.prompt)}
    return truncate([document], limits, template.tokenizer.bos_token_id)


def _number_of(prompt: Messages) -> float:
    """The same number for the same prompt, in every process and run."""
    digest = hashlib.blake2b(json.dumps(prompt).encode(), digest_size=8).digest()
    return float(int.from_bytes(digest, "big") >> 12)  # as many bits as float64 holds


def _alike(documents: list[Tokens]) -> bool:
    """Whether both documents are the same, so that nothing can be learned from comparing them."""
    first, second = documents
    return first.ids == second.ids and first.mask == second.mask


def _continued(prompt: list, continuation: list, template: Template) -> Tokens:
    answers = sum(message["role"] == "assistant" for message in continuation)
    refuse_empty_answers([*prompt, *continuation], answers)
    return template.encode(Conversation(prompt + continuation), answers)


def _sharing(documents: list[Tokens] | str) -> list[Tokens] | str:
    """Notes how many tokens the second document has in common with the first, none of them learned."""
    if isinstance(documents, list):
        first, second = documents
        longest = min(first.mask.index(True), second.mask.index(True))
        differ = (i for i in range(longest) if first.ids[i] != second.ids[i])
        second.shared = next(differ, longest)
    return documents


def _labelled(record: ClassificationExample, template: Template, limits: TruncationConfig) -> list[Tokens] | str:
    texts = [record.text] if record.text_pair is None else [record.text, record.text_pair]
    refuse_unusable(texts)
    encoded, notes = template.tokenizer(*texts), {}
    if len(encoded["input_ids"]) > limits.max_length:
        if limits.truncation == "drop":
            return TOO_LONG
        notes = {"truncated": 1}
        encoded = template.tokenizer(*texts, truncation=True, max_length=limits.max_length)
    ids = encoded["input_ids"]
    if not ids:
        raise DataError("the text is empty", "invalid-row")
    tokens = Tokens(ids, [False] * len(ids), notes, doc_features={"label": record.label})
    tokens.token_features["token_types"] = encoded.get("token_type_ids", [0] * len(ids))
    return [tokens]


def _rollout(record: Rollout, template: Template, limits: TruncationConfig) -> list[Tokens]:
    """The whole rollout, since a prompt that was cut would have other log-probabilities than those in the row.

    One that is too long to train on is excluded and not left out, or failures by length would be missing from the
    mean of their group (open-instruct#1794). So is one whose sampling was cut off, with `mask_truncated`.
    """
    tokens, truncated = _sampled(record, template, limits.mask_truncated)
    excluded = ""
    if len(tokens.ids) > limits.max_length:
        excluded = "long-rollouts"
    elif limits.mask_truncated and truncated:
        excluded = "truncated-rollouts"
    if excluded:
        tokens.notes = tokens.notes | {excluded: 1}
    n = sum(tokens.mask)
    for name, numbers in record.tokens.items():
        numbers = numbers * n if len(numbers) == 1 and name in ("advantages", "returns") else numbers
        if len(numbers) != n:
            raise DataError(
                f"{name} has {len(numbers)} numbers for the {n} tokens of the response with its end; "
                "give prompt_ids and response_ids, so that the tokens are those that were sampled",
                "invalid-row",
            )
        following = iter(numbers)
        tokens.token_features[name] = [next(following) if learned else 0.0 for learned in tokens.mask]
    prompt_ids = tuple(tokens.ids[: tokens.mask.index(True)])
    tokens.doc_features |= {"reward": record.reward, "group": float(hash(prompt_ids) % (1 << 52))}
    tokens.doc_features[EXCLUDED] = float(bool(excluded))
    return [tokens]


def _sampled(record: Rollout, template: Template, must_know: bool) -> tuple[Tokens, bool]:
    """The tokens of a rollout, and whether its sampling was cut off, which may be False unless it `must_know`.

    A response of text is taken to have ended, unless the row says that it was truncated; then it has no end token.
    """
    if not isinstance(record.response, str):
        _check_ids([*record.prompt, *record.response], len(template.tokenizer))
        prompt, response = record.prompt, record.response
        tokens = Tokens([*prompt, *response], [False] * len(prompt) + [True] * len(response))
        if record.truncated is None and must_know:
            return tokens, response[-1] not in template.end_ids()
        return tokens, bool(record.truncated)
    tokens = template.encode(Conversation([*record.prompt, assistant(record.response)]), 1)
    if record.truncated and tokens.ids[-1] in template.end_ids() and sum(tokens.mask) > 1:
        tokens.ids.pop()
        tokens.mask.pop()
    return tokens, bool(record.truncated)


def _check_ids(ids: list[int], n_tokens: int) -> None:
    if max(ids) >= n_tokens:
        raise DataError(f"the token id {max(ids)} is beyond the tokenizer's {n_tokens} tokens", "invalid-row")


def truncate(documents: list[Tokens], limits: TruncationConfig, bos_token_id: int | None) -> list[Tokens] | str:
    """Documents of one example of at most `max_length` tokens, their prompts cut alike; or why nothing is left.

    truncation = prompt: the oldest tokens of the prompt go (a BOS stays); when the last answer alone is too long, its
    end goes. truncation = end: the end goes.
    """
    if max(len(d.ids) for d in documents) <= limits.max_length and limits.max_prompt_length is None:
        return documents if all(any(d.mask) for d in documents) else NOTHING_LEFT
    # Where the last learned span begins; one token before it has to stay, to predict its first.
    answers = [len(d.mask) - d.mask[::-1].index(False) for d in documents]
    over = max(len(d.ids) for d in documents) - limits.max_length
    prompt_over = max(answers) - limits.max_prompt_length if limits.max_prompt_length else 0
    if limits.truncation == "drop" and max(over, prompt_over) > 0:
        return TOO_LONG
    cut = max(0, prompt_over, over if limits.truncation == "prompt" else 0)
    cut = min(cut, min(answers) - 1)
    shortened = [_shorten(document, cut, limits.max_length, bos_token_id) for document in documents]
    return shortened if all(any(d.mask) for d in shortened) else NOTHING_LEFT


def _shorten(tokens: Tokens, cut: int, max_length: int, bos_token_id: int | None) -> Tokens:
    """Without `cut` tokens at the front, but for a BOS, and without those at the end that are too many."""
    if not cut and len(tokens.ids) <= max_length:
        return tokens
    head = 1 if tokens.ids[0] == bos_token_id else 0
    ids = (tokens.ids[:head] + tokens.ids[head + cut :])[:max_length]
    mask = (tokens.mask[:head] + tokens.mask[head + cut :])[:max_length]
    return Tokens(ids, [False, *mask[1:]], tokens.notes | {"truncated": 1}, doc_features=tokens.doc_features)
