"""Row formats of prompts, whose responses are sampled during training.

A row with a conversation counts as its prompt: the turns before the last response. Reward functions get the full row.
"""

from minitrain.config.sections import DatasetConfig
from minitrain.errors import DataError

from .examples import Prompt, fill, prompt_of, row_format, system_of, text_of
from .messages import Messages, user


@row_format("prompt_messages", "prompt", "messages")
@row_format("prompt_conversations", "prompt", "conversations")
@row_format("prompt", "prompt", "prompt")
@row_format("prompt_question", "prompt", "question")
@row_format("prompt_instruction", "prompt", "instruction")
@row_format("prompt_query", "prompt", "query")
def _prompt(row: dict, dataset: DatasetConfig) -> Prompt:
    if dataset.prompt_template is not None:
        messages = [*system_of(row), user(fill(dataset.prompt_template, row, "prompt_template"))]
    elif "query" in row and not prompt_of(row):
        messages = [*system_of(row), user(text_of(row, "query"))]
    else:
        messages = _without_response(prompt_of(row))
    row.read.update(row)  # reward functions get the full row
    return Prompt(messages)


def _without_response(messages: Messages) -> Messages:
    """Return the turns before the last response."""
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise DataError("expected a turn of the user, got a response alone", "invalid-row")
    return messages
