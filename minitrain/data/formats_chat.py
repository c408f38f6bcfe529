"""Row formats of conversations, of prompts with responses, and of texts."""

from minitrain.config.sections import DatasetConfig
from minitrain.errors import DataError

from .examples import (
    Conversation,
    PlainText,
    Preference,
    alpaca_history,
    check_ends_with_assistant,
    fill,
    preference_of,
    prompt_of,
    response_of,
    row_format,
    system_of,
    text_of,
)
from .formats_preference import openai_preference_of
from .formats_raft import documents_by_type, documents_in_columns, documents_in_context, raft_conversation
from .messages import Message, Messages, assistant, is_empty, parse_messages, user


@row_format("chosen", "conversation", "chosen", "rejected")
def _chosen(row: dict, dataset: DatasetConfig) -> Conversation:
    """Train on the chosen responses, as before a preference loss on the same rows."""
    return _chosen_of(preference_of(row, row["chosen"], row["rejected"]))


@row_format("chosen_of_messages", "conversation", "chosen_messages", "rejected_messages")
def _chosen_of_messages(row: dict, dataset: DatasetConfig) -> Conversation:
    return _chosen_of(preference_of(row, row["chosen_messages"], row["rejected_messages"]))


@row_format("preferred_output", "conversation", "input", "preferred_output", "non_preferred_output")
def _preferred_output(row: dict, dataset: DatasetConfig) -> Conversation:
    return _chosen_of(openai_preference_of(row, dataset))


@row_format("messages", "conversation", "messages")
def _messages(row: dict, dataset: DatasetConfig) -> Conversation:
    return Conversation(_with_response(row, "messages"))


@row_format("conversations", "conversation", "conversations")
def _conversations(row: dict, dataset: DatasetConfig) -> Conversation:
    return Conversation(_with_response(row, "conversations"))


@row_format("prompt_response", "conversation", "prompt", "response")
def _prompt_response(row: dict, dataset: DatasetConfig) -> Conversation:
    return _pair(row, dataset)


@row_format("prompt_completion", "conversation", "prompt", "completion")
def _prompt_completion(row: dict, dataset: DatasetConfig) -> Conversation:
    """Two strings, or lists of turns, of which those of the completion are trained on."""
    is_text = isinstance(row["prompt"], str) and isinstance(row["completion"], str)
    if is_text or dataset.prompt_template or dataset.response_template:
        return _pair(row | {"response": row["completion"]}, dataset)
    completion = response_of(row["completion"], "completion")
    check_ends_with_assistant(completion, "completion")
    return Conversation([*map(_untrained, prompt_of(row)), *completion])


@row_format("alpaca", "conversation", "instruction", "output")
def _alpaca(row: dict, dataset: DatasetConfig) -> Conversation:
    history = alpaca_history(row)
    prompt = text_of(row, "instruction")
    if row.get("input"):
        prompt += "\n" + text_of(row, "input")
    pair = _pair(row | {"prompt": prompt, "response": text_of(row, "output")}, dataset)
    return Conversation(pair.messages[:-2] + history + pair.messages[-2:])


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
    return Conversation([*system_of(row), user(prompt), assistant(response)])


def _chosen_of(pair: Preference) -> Conversation:
    return Conversation(pair.prompt + pair.chosen, variables=pair.variables, unread=pair.unread)


def _untrained(message: Message) -> Message:
    return message | {"weight": 0.0} if message["role"] == "assistant" else message


def _with_response(row: dict, key: str) -> Messages:
    """Return the turns of a column, after the one of the column `system`. Raise DataError if the assistant has none."""
    messages = parse_messages(row[key], key)
    if not any(message["role"] == "assistant" and not is_empty(message) for message in messages):
        raise DataError(f"{key}: expected a turn of the assistant, got none", "no-answer")
    return system_of(row) + messages
