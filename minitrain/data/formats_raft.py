"""Row formats of RAFT (arXiv 2403.10131): a question with documents, and its prompt."""

import random
from typing import NamedTuple

from minitrain.config.sections import DatasetConfig
from minitrain.errors import DataError, short

from .examples import ROW_FORMATS, Conversation, assistant, fill, keys_of, text_of, user

TEMPLATE = "{documents}\n\n{question}"
ANSWERS = ("teacher_answer", "cot_answer", "answer")  # keys of the teacher's answer, in order of priority


class Documents(NamedTuple):
    """The documents of a question: with the answer (oracle), without it (distractors), and without a type (untyped)."""

    oracle: list[str]
    distractors: list[str]
    untyped: list[str]


def documents_of(row: dict) -> Documents | None:
    """Return the documents of a data row, or None if its keys match no RAFT format. Raise DataError for a bad row."""
    name = next((name for name in FORMATS if all(key in row for key in ROW_FORMATS[name].required)), None)
    return None if name is None else FORMATS[name](row)


def teacher_answer(row: dict) -> str | None:
    key = next((key for key in ANSWERS if row.get(key) is not None), None)
    return None if key is None else text_of(row, key)


def raft_prompt(row: dict, documents: Documents, dataset: DatasetConfig) -> str:
    """Return the user turn: the numbered documents and the question, formatted with `prompt_template` if it is set.

    The prompt has the oracle with probability `p_oracle`, and `n_distractors` distractors, in random order. The random
    numbers depend on `dataset.seed`, the question and its documents, but not on the order of the rows. So the same
    question with other documents has its oracle at another position. Untyped documents are all kept, in order.
    """
    key = "\n".join([f"{dataset.seed} {text_of(row, 'question')}", *documents.oracle, *documents.distractors])
    # Half of a surrogate pair is reported later, by `check_texts`.
    generator = random.Random(key.encode(errors="surrogatepass"))
    oracle = documents.oracle if generator.random() < dataset.p_oracle else []
    distractors = documents.distractors
    if dataset.n_distractors is not None and dataset.n_distractors < len(distractors):
        distractors = generator.sample(distractors, dataset.n_distractors)
    texts = distractors + oracle
    generator.shuffle(texts)
    numbered = "\n\n".join(f"Document {i}: {text}" for i, text in enumerate(texts + documents.untyped, 1))
    return fill(dataset.prompt_template or TEMPLATE, row | {"documents": numbered}, "prompt_template")


def raft_conversation(row: dict, documents: Documents, dataset: DatasetConfig) -> Conversation:
    """Return the prompt with the teacher's answer. Raise DataError if the row lacks the answer or a document's type."""
    answer = teacher_answer(row)
    if answer is None:
        raise DataError(f"expected one of the keys {', '.join(ANSWERS)}, got {keys_of(row)}", "invalid-row")
    if documents.untyped:
        raise DataError(
            "documents[0]: expected {type: oracle or distractor, text: ...}, got a string without a type",
            "invalid-row",
        )
    prompt = raft_prompt(row, documents, dataset)
    if dataset.response_template is not None:
        answer = fill(dataset.response_template, row | {"answer": answer, "response": answer}, "response_template")
    if not answer:
        raise DataError("the teacher's answer is empty", "no-answer")
    return Conversation([user(prompt), assistant(answer)])


# ------------------------------------------------------------------------------------------- documents of a data row


def documents_by_type(row: dict) -> Documents:
    """Read `documents`: objects with a type (oracle or distractor) and a text, or strings only."""
    documents = row["documents"]
    if not isinstance(documents, list) or not documents:
        raise DataError(f"documents: expected a list of documents, got {short(documents)!r}", "invalid-row")
    if all(isinstance(document, str) for document in documents):
        return Documents([], [], documents)
    texts: dict[str, list[str]] = {"oracle": [], "distractor": []}
    for i, document in enumerate(documents):
        document_type = document.get("type") if isinstance(document, dict) else None
        key = next((key for key in ("text", "content") if isinstance(document, dict) and key in document), None)
        if document_type not in ("oracle", "distractor") or key is None:
            raise DataError(
                f"documents[{i}]: expected {{type: oracle or distractor, text: ...}}, got {short(document)!r}",
                "invalid-row",
            )
        texts[document_type].append(text_of(document, key))
    return Documents(texts["oracle"], texts["distractor"], [])


def documents_in_context(row: dict) -> Documents:
    """Read `context.sentences`, a list with one list of documents, as in the files of RAFT's authors."""
    context = row["context"]
    sentences = context.get("sentences") if isinstance(context, dict) else None
    if isinstance(sentences, list) and len(sentences) == 1 and isinstance(sentences[0], list):
        sentences = sentences[0]
    if not isinstance(sentences, list) or not sentences or not all(isinstance(text, str) for text in sentences):
        raise DataError(f"context.sentences: expected a list of documents, got {short(sentences)!r}", "invalid-row")
    oracle = text_of(row, "oracle_context")
    return Documents([oracle], [text for text in sentences if text != oracle], [])


def documents_in_columns(row: dict) -> Documents:
    distractors = row["distractors"]
    if not isinstance(distractors, list) or not all(isinstance(text, str) for text in distractors):
        raise DataError(f"distractors: expected a list of strings, got {short(distractors)!r}", "invalid-row")
    return Documents([text_of(row, "oracle_context")], distractors, [])


FORMATS = {
    "raft": documents_by_type,
    "raft_context": documents_in_context,
    "raft_distractors": documents_in_columns,
}
