"""Schemas of rows to learn from word by word: conversations, prompts with answers, and texts."""

from minitrain.config.schema import DatasetConfig
from minitrain.errors import DataError, short

from .examples import Conversation, Messages, PlainText, assistant, compared, fill, schema, text_of, turns_of, user
from .formats_raft import in_columns, in_context, raft_conversation, typed


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
    return _pair(row, dataset)


@schema("alpaca", "conversation", "instruction", "output")
def _alpaca(row: dict, dataset: DatasetConfig) -> Conversation:
    turns = []
    if row.get("system"):
        turns.append({"role": "system", "content": text_of(row, "system")})
    history = row.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"history is not a list of pairs, but {short(history)!r}", "invalid-row")
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(f"history[{i}] is not a pair of texts [instruction, output]", "invalid-row")
        turns += [user(pair[0]), assistant(pair[1])]
    prompt = text_of(row, "instruction")
    if row.get("input"):
        prompt += "\n" + text_of(row, "input")
    pair = _pair(row | {"prompt": prompt, "response": text_of(row, "output")}, dataset)
    return Conversation(turns + pair.messages)


@schema("raft", "conversation", "question", "documents")
def _raft(row: dict, dataset: DatasetConfig) -> Conversation:
    return raft_conversation(row, typed(row), dataset)


@schema("raft_context", "conversation", "question", "context", "oracle_context")
def _raft_context(row: dict, dataset: DatasetConfig) -> Conversation:
    return raft_conversation(row, in_context(row), dataset)


@schema("raft_distractors", "conversation", "question", "oracle_context", "distractors")
def _raft_distractors(row: dict, dataset: DatasetConfig) -> Conversation:
    return raft_conversation(row, in_columns(row), dataset)


@schema("question_answer", "conversation", "question", "answer")
def _question_answer(row: dict, dataset: DatasetConfig) -> Conversation:
    return _pair(row | {"prompt": row["question"], "response": row["answer"]}, dataset)


@schema("query_response", "conversation", "query", "response")
def _query_response(row: dict, dataset: DatasetConfig) -> Conversation:
    return _pair(row | {"prompt": row["query"]}, dataset)


@schema("text", "conversation", "text")
def _plain_text(row: dict, dataset: DatasetConfig) -> PlainText:
    text = text_of(row, "text")
    if not text:
        raise DataError("text is empty", "invalid-row")
    return PlainText(text)


# ------------------------------------------------------------------------------------------------------- helpers


def _pair(row: dict, dataset: DatasetConfig) -> Conversation:
    prompt, response = text_of(row, "prompt"), text_of(row, "response")
    if dataset.prompt_template is not None:
        prompt = fill(dataset.prompt_template, row, "prompt_template")
    if dataset.response_template is not None:
        response = fill(dataset.response_template, row, "response_template")
    if not response:
        raise DataError("response is empty, so there is nothing to learn", "no-answer")
    return Conversation([user(prompt), assistant(response)])


def _answered(messages: Messages, key: str) -> Messages:
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise DataError(f"{key} has no turn of the assistant, so there is nothing to learn", "no-answer")
    return messages
