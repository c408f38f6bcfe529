"""Questions with documents, the rows of RAFT (arXiv 2403.10131), and the prompts that are made of them."""

import random
from typing import NamedTuple

from minitrain.config.schema import DatasetConfig
from minitrain.errors import DataError

from .examples import SCHEMAS, Conversation, assistant, fill, keys_of, text_of, user

TEMPLATE = "{documents}\n\n{question}"
ANSWERS = ("teacher_answer", "cot_answer", "answer")  # keys of what a teacher has answered


class Documents(NamedTuple):
    """The documents of a question: those that the answer stands in, others, and those of which nobody has said."""

    oracle: list[str]
    distractors: list[str]
    unsorted: list[str]


def documents_of(row: dict) -> Documents | None:
    """The documents of a row that is told by its keys; None for a row of another kind. Raises DataError."""
    name = next((name for name in SHAPES if all(key in row for key in SCHEMAS[name].required)), None)
    return None if name is None else SHAPES[name](row)


def teacher_answer(row: dict) -> str | None:
    key = next((key for key in ANSWERS if row.get(key) is not None), None)
    return None if key is None else text_of(row, key)


def raft_prompt(row: dict, documents: Documents, dataset: DatasetConfig) -> str:
    """The user's turn: the documents, numbered, and then the question, or what `prompt_template` makes of both.

    The oracle stays with probability p_oracle, as do `n_distractors` of the others, and all are shuffled. This is drawn
    from `dataset.seed`, the question and its documents, whatever the order of the rows: a question that is asked again
    about other documents has its oracle elsewhere. Documents of which nobody has said what they are stay as they are.
    """
    key = "\n".join([f"{dataset.seed} {text_of(row, 'question')}", *documents.oracle, *documents.distractors])
    draw = random.Random(key.encode(errors="surrogatepass"))  # half a surrogate pair is told when the text is encoded
    oracle = documents.oracle if draw.random() < dataset.p_oracle else []
    distractors = documents.distractors
    if dataset.n_distractors is not None and dataset.n_distractors < len(distractors):
        distractors = draw.sample(distractors, dataset.n_distractors)
    texts = distractors + oracle
    draw.shuffle(texts)
    numbered = "\n\n".join(f"Document {i}: {text}" for i, text in enumerate(texts + documents.unsorted, 1))
    return fill(dataset.prompt_template or TEMPLATE, row | {"documents": numbered}, "prompt_template")


def raft_conversation(row: dict, documents: Documents, dataset: DatasetConfig) -> Conversation:
    """The prompt and the teacher's answer. Raises DataError."""
    answer = teacher_answer(row)
    if answer is None:
        raise DataError(
            f"the row has documents, but none of {', '.join(ANSWERS)}; it has {keys_of(row)}", "invalid-row"
        )
    if documents.unsorted:
        raise DataError(
            "documents[0] is a text; to train on it, say what it is: {type: oracle or distractor, text: ...}",
            "invalid-row",
        )
    prompt = raft_prompt(row, documents, dataset)
    if dataset.response_template is not None:
        answer = fill(dataset.response_template, row | {"answer": answer, "response": answer}, "response_template")
    if not answer:
        raise DataError("the teacher's answer is empty, so there is nothing to learn", "no-answer")
    return Conversation([user(prompt), assistant(answer)])


# ------------------------------------------------------------------------------------------- the shapes of such rows


def typed(row: dict) -> Documents:
    """``documents``: objects with a type (oracle or distractor) and a text, or texts alone."""
    documents = row["documents"]
    if not isinstance(documents, list) or not documents:
        raise DataError("documents is not a list of documents", "invalid-row")
    if all(isinstance(document, str) for document in documents):
        return Documents([], [], documents)
    texts: dict[str, list[str]] = {"oracle": [], "distractor": []}
    for i, document in enumerate(documents):
        kind = document.get("type") if isinstance(document, dict) else None
        key = next((key for key in ("text", "content") if isinstance(document, dict) and key in document), None)
        if kind not in texts or key is None:
            raise DataError(
                f"documents[{i}] is not an object with type: oracle or distractor, and a text", "invalid-row"
            )
        texts[kind].append(text_of(document, key))
    return Documents(texts["oracle"], texts["distractor"], [])


def in_context(row: dict) -> Documents:
    """The files of RAFT's authors: ``context.sentences`` is a list with one list of documents."""
    context = row["context"]
    sentences = context.get("sentences") if isinstance(context, dict) else None
    if isinstance(sentences, list) and len(sentences) == 1 and isinstance(sentences[0], list):
        sentences = sentences[0]
    if not isinstance(sentences, list) or not sentences or not all(isinstance(text, str) for text in sentences):
        raise DataError("context.sentences is not a list of documents", "invalid-row")
    oracle = text_of(row, "oracle_context")
    return Documents([oracle], [text for text in sentences if text != oracle], [])


def in_columns(row: dict) -> Documents:
    distractors = row["distractors"]
    if not isinstance(distractors, list) or not all(isinstance(text, str) for text in distractors):
        raise DataError("distractors is not a list of texts", "invalid-row")
    return Documents([text_of(row, "oracle_context")], distractors, [])


SHAPES = {"raft": typed, "raft_context": in_context, "raft_distractors": in_columns}  # by the names of their schemas
