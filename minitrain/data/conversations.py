"""Schemas of rows to learn from word by word: conversations, prompts with answers, and texts."""

import random

from ..errors import DataError
from ..schema import DatasetConfig
from .records import Conversation, Messages, PlainText, assistant, compared, fill, schema, text_of, turns_of, user

RAFT_TEMPLATE = "{documents}\n\n{question}"


@schema("chosen", "conversation", "chosen", "rejected")
def _chosen(row: dict, dataset: DatasetConfig) -> Conversation:
    """The better answer of a preference is learned, as it is before a preference loss learns from the same rows."""
    pair = compared(row, row["chosen"], row["rejected"])
    return Conversation(pair.prompt + pair.chosen)


@schema("messages", "conversation", "messages")
def _messages(row: dict, dataset: DatasetConfig) -> Conversation:
    return Conversation(_answered(turns_of(row["messages"], "messages"), "messages"))


@schema("conversations", "conversation", "conversations")
def _conversations(row: dict, dataset: DatasetConfig) -> Conversation:
    turns = _answered(turns_of(row["conversations"], "conversations"), "conversations")
    if row.get("system"):
        turns = [{"role": "system", "content": text_of(row, "system")}, *turns]
    return Conversation(turns)


@schema("prompt_response", "conversation", "prompt", "response")
def _prompt_response(row: dict, dataset: DatasetConfig) -> Conversation:
    return _pair(row, "prompt", "response", dataset)


@schema("alpaca", "conversation", "instruction", "output")
def _alpaca(row: dict, dataset: DatasetConfig) -> Conversation:
    turns = []
    if row.get("system"):
        turns.append({"role": "system", "content": text_of(row, "system")})
    for i, pair in enumerate(row.get("history") or []):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(f"history[{i}] is not a pair of texts [instruction, output]")
        turns += [user(pair[0]), assistant(pair[1])]
    prompt = text_of(row, "instruction")
    if row.get("input"):
        prompt += "\n" + text_of(row, "input")
    pair = _pair(row | {"prompt": prompt, "response": text_of(row, "output")}, "prompt", "response", dataset)
    return Conversation(turns + pair.messages)


@schema("raft", "conversation", "question", "documents", "teacher_answer")
def _raft(row: dict, dataset: DatasetConfig) -> Conversation:
    """``documents``: objects with a type (oracle or distractor) and a text."""
    texts: dict[str, list[str]] = {"oracle": [], "distractor": []}
    documents = row["documents"]
    if not isinstance(documents, list) or not documents:
        raise DataError("documents is not a list of documents")
    for i, document in enumerate(documents):
        kind = document.get("type") if isinstance(document, dict) else None
        key = next((key for key in ("text", "content") if isinstance(document, dict) and key in document), None)
        if kind not in texts or key is None:
            raise DataError(f"documents[{i}] is not an object with type: oracle or distractor, and a text")
        texts[kind].append(text_of(document, key))
    return _with_documents(row, text_of(row, "teacher_answer"), texts["oracle"], texts["distractor"], dataset)


@schema("raft_context", "conversation", "question", "context", "oracle_context", "cot_answer")
def _raft_context(row: dict, dataset: DatasetConfig) -> Conversation:
    """The files of RAFT's authors: ``context.sentences`` is a list with one list of documents."""
    context = row["context"]
    sentences = context.get("sentences") if isinstance(context, dict) else None
    if isinstance(sentences, list) and len(sentences) == 1 and isinstance(sentences[0], list):
        sentences = sentences[0]
    if not isinstance(sentences, list) or not sentences or not all(isinstance(text, str) for text in sentences):
        raise DataError("context.sentences is not a list of documents")
    oracle = text_of(row, "oracle_context")
    others = [text for text in sentences if text != oracle]
    return _with_documents(row, text_of(row, "cot_answer"), [oracle], others, dataset)


@schema("question_answer", "conversation", "question", "answer")
def _question_answer(row: dict, dataset: DatasetConfig) -> Conversation:
    return _pair(row | {"prompt": row["question"], "response": row["answer"]}, "prompt", "response", dataset)


@schema("query_response", "conversation", "query", "response")
def _query_response(row: dict, dataset: DatasetConfig) -> Conversation:
    return _pair(row | {"prompt": row["query"]}, "prompt", "response", dataset)


@schema("text", "conversation", "text")
def _plain_text(row: dict, dataset: DatasetConfig) -> PlainText:
    text = text_of(row, "text")
    if not text:
        raise DataError("text is empty")
    return PlainText(text)


# ------------------------------------------------------------------------------------------------------- helpers


def _pair(row: dict, prompt_key: str, response_key: str, dataset: DatasetConfig) -> Conversation:
    prompt, response = text_of(row, prompt_key), text_of(row, response_key)
    if dataset.prompt_template is not None:
        prompt = fill(dataset.prompt_template, row, "prompt_template")
    if dataset.response_template is not None:
        response = fill(dataset.response_template, row, "response_template")
    if not response:
        raise DataError(f"{response_key} is empty, so there is nothing to learn")
    return Conversation([user(prompt), assistant(response)])


def _with_documents(
    row: dict, answer: str, oracle: list[str], distractors: list[str], dataset: DatasetConfig
) -> Conversation:
    """RAFT (arXiv 2403.10131): the oracle stays with probability p_oracle, and the documents are shuffled.

    Both are drawn for each question from `dataset.seed`, whatever the order of the rows.
    """
    draw = random.Random(f"{dataset.seed} {row['question']}")
    documents = distractors + (oracle if draw.random() < dataset.p_oracle else [])
    draw.shuffle(documents)
    numbered = "\n\n".join(f"Document {i}: {text}" for i, text in enumerate(documents, 1))
    row = row | {"documents": numbered, "answer": answer, "response": answer}
    prompt = fill(dataset.prompt_template or RAFT_TEMPLATE, row, "prompt_template")
    response = fill(dataset.response_template, row, "response_template") if dataset.response_template else answer
    if not response:
        raise DataError("the teacher's answer is empty, so there is nothing to learn")
    return Conversation([user(prompt), assistant(response)])


def _answered(messages: Messages, key: str) -> Messages:
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise DataError(f"{key} has no turn of the assistant, so there is nothing to learn")
    return messages
