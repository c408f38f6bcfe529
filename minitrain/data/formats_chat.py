"""Row formats of conversations, of prompts with responses, and of texts."""

from minitrain.config.sections import DatasetConfig
from minitrain.errors import DataError, short

from .examples import (
    Conversation,
    PlainText,
    fill,
    preference_of,
    row_format,
    text_of,
)
from .formats_raft import documents_by_type, documents_in_columns, documents_in_context, raft_conversation
from .messages import Messages, assistant, is_empty, parse_messages, user


@row_format("chosen", "conversation", "chosen", "rejected")
def _chosen(row: dict, dataset: DatasetConfig) -> Conversation:
    """Train on the chosen responses, as before a preference loss on the same rows."""
    pair = preference_of(row, row["chosen"], row["rejected"])
    return Conversation(pair.prompt + pair.chosen)


@row_format("messages", "conversation", "messages")
def _messages(row: dict, dataset: DatasetConfig) -> Conversation:
    return Conversation(_with_response(row, "messages"))


@row_format("conversations", "conversation", "conversations")
def _conversations(row: dict, dataset: DatasetConfig) -> Conversation:
    turns = _with_response(row, "conversations")
    if row.get("system"):
        turns = [{"role": "system", "content": text_of(row, "system")}, *turns]
    return Conversation(turns)


@row_format("prompt_response", "conversation", "prompt", "response")
def _prompt_response(row: dict, dataset: DatasetConfig) -> Conversation:
    return _pair(row, dataset)


@row_format("alpaca", "conversation", "instruction", "output")
def _alpaca(row: dict, dataset: DatasetConfig) -> Conversation:
    turns = []
    if row.get("system"):
        turns.append({"role": "system", "content": text_of(row, "system")})
    history = row.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"history: expected a list of pairs, got {short(history)!r}", "invalid-row")
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(
                f"history[{i}]: expected [instruction, output], two strings, got {short(pair)!r}", "invalid-row"
            )
        turns += [user(pair[0]), assistant(pair[1])]
    prompt = text_of(row, "instruction")
    if row.get("input"):
        prompt += "\n" + text_of(row, "input")
    pair = _pair(row | {"prompt": prompt, "response": text_of(row, "output")}, dataset)
    return Conversation(turns + pair.messages)


@row_format("raft", "conversation", "question", "documents")
def _raft(row: dict, dataset: DatasetConfig) -> Conversation:
    return raft_conversation(row, documents_by_type(row), dataset)


@row_format("raft_context", "conversation", "question", "context", "oracle_context")
def _raft_context(row: dict, dataset: DatasetConfig) -> Conversation:
    return raft_conversation(row, documents_in_context(row), dataset)


@row_format("raft_distractors", "conversation", "question", "oracle_context", "distractors")
def _raft_distractors(row: dict, dataset: DatasetConfig) -> Conversation:
    return raft_conversation(row, documents_in_columns(row), dataset)


@row_format("question_answer", "conversation", "question", "answer")
def _question_answer(row: dict, dataset: DatasetConfig) -> Conversation:
    return _pair(row | {"prompt": row["question"], "response": row["answer"]}, dataset)


@row_format("query_response", "conversation", "query", "response")
def _query_response(row: dict, dataset: DatasetConfig) -> Conversation:
    return _pair(row | {"prompt": row["query"]}, dataset)


@row_format("text", "conversation", "text")
def _plain_text(row: dict, dataset: DatasetConfig) -> PlainText:
    text = text_of(row, "text")
    if not text:
        raise DataError("text: expected a text, got an empty string", "invalid-row")
    return PlainText(text)


# ------------------------------------------------------------------------------------------------------- helpers


def _pair(row: dict, dataset: DatasetConfig) -> Conversation:
    prompt, response = text_of(row, "prompt"), text_of(row, "response")
    if dataset.prompt_template is not None:
        prompt = fill(dataset.prompt_template, row, "prompt_template")
    if dataset.response_template is not None:
        response = fill(dataset.response_template, row, "response_template")
    if not response:
        raise DataError("response: expected a response, got an empty string", "no-answer")
    return Conversation([user(prompt), assistant(response)])


def _with_response(row: dict, key: str) -> Messages:
    """Return the turns of a column. Raise DataError if the assistant has none."""
    messages = parse_messages(row[key], key)
    if not any(message["role"] == "assistant" and not is_empty(message) for message in messages):
        raise DataError(f"{key}: expected a turn of the assistant, got none", "no-answer")
    return messages
