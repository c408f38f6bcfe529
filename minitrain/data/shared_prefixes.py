"""Lay out the documents of one example so that a beginning which they have in common is computed once."""

from minitrain.batch import TARGET_WEIGHTS

from .counts import merge_uses
from .text_encoder import Tokens


def merge_prefixes(documents: list[Tokens]) -> list[Tokens]:
    """Return the documents, longest first, without those that are the beginning of a longer one.

    The longer document is trained on their targets, too.
    """
    kept: list[Tokens] = []
    for document in sorted(documents, key=lambda d: -len(d.ids)):
        longer = next((other for other in kept if _contains(other, document)), None)
        if longer is None:
            kept.append(document)
        else:
            _add_targets(longer, document)
    return kept


def _contains(document: Tokens, beginning: Tokens) -> bool:
    """Return whether a document begins with another one, and can have its targets besides its own."""
    if document.ids[: len(beginning.ids)] != beginning.ids:
        return False
    return not any(a and b for a, b in zip(document.mask, beginning.mask))


def _add_targets(document: Tokens, beginning: Tokens) -> None:
    n = len(beginning.ids)
    if any(TARGET_WEIGHTS in d.token_features for d in (document, beginning)):
        old, new = (d.token_features.get(TARGET_WEIGHTS) or list(map(float, d.mask)) for d in (document, beginning))
        document.token_features[TARGET_WEIGHTS] = [max(a, b) for a, b in zip(old, new)] + old[n:]
    document.mask[:n] = [a or b for a, b in zip(document.mask, beginning.mask)]
    document.turns = sorted(document.turns + beginning.turns)
    document.uses = merge_uses(document.uses, beginning.uses)


def share_prefixes(documents: list[Tokens]) -> list[Tokens]:
    """Return the documents in groups of an owner and those that share its beginning, and set their `shared`.

    A document joins the first owner unless it has more in common with another document that cannot share all of its
    prompt with that owner: truncation may leave them a common beginning that the first owner does not have.
    """
    laid_out, rest = [], documents
    while rest:
        (owner, *others), rest = rest, []
        laid_out.append(owner)
        common = [n_shared(owner, document) for document in others]
        apart = [document for document, n in zip(others, common) if n < document.mask.index(True)]
        for document, n in zip(others, common):
            fits = n == document.mask.index(True) or all(n_shared(o, document) <= n for o in apart if o is not document)
            if n and fits:
                document.shared = n
                laid_out.append(document)
            else:
                rest.append(document)
    return laid_out


def n_shared(first: Tokens, second: Tokens, longest: int | None = None) -> int:
    """Return how many leading tokens two documents have in common, at most those before the second one's targets."""
    longest = second.mask.index(True) if longest is None else longest
    if first.ids[:longest] == second.ids[:longest]:
        return longest
    pairs = zip(first.ids[:longest], second.ids[:longest])
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(first.ids))
