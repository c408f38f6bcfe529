"""Tools, calls, reasoning and weights in the formats of several libraries: one dialogue gives one text in each."""

import json

import pytest

from minitrain.config.sections import DatasetConfig
from minitrain.data.encode import TruncationConfig, encode
from minitrain.data.examples import to_example
from minitrain.data.template import Template
from minitrain.errors import DataError
from minitrain.model.tiny import tiny_tokenizer
from tests.messages import raises

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "weather", "description": "Get the weather.", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"name": "weather", "arguments": {"city": "Paris"}}
CALL_AS_JSON = {"name": "weather", "arguments": json.dumps(CALL["arguments"])}
OPENAI_CALL = {"id": "call_1", "type": "function", "function": CALL_AS_JSON}
RESULT, REASONING, ANSWER = '{"celsius": 21}', "I need the weather.", "It is 21 degrees."

SYSTEM, ASK = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "How warm is Paris?"}
CALLS = {"role": "assistant", "reasoning_content": REASONING, "tool_calls": [OPENAI_CALL]}
TOLD = {"role": "tool", "tool_call_id": "call_1", "content": RESULT}
TELL = {"role": "assistant", "content": ANSWER}


def part(kind: str, value: str) -> dict:
    return {"type": kind, "value": value}


ROWS = {
    "OpenAI": {"messages": [SYSTEM, ASK, CALLS, TOLD, TELL], "tools": [TOOL]},
    "OpenAI, content of parts": {
        "messages": [SYSTEM, ASK | {"content": [{"type": "text", "text": ASK["content"]}]}, CALLS, TOLD, TELL],
        "tools": [TOOL],
    },
    "OpenAI, functions": {
        "messages": [
            SYSTEM,
            ASK,
            {"role": "assistant", "content": None, "reasoning": REASONING, "function_call": CALL_AS_JSON},
            {"role": "function", "name": "weather", "content": RESULT},
            TELL,
        ],
        "functions": [FUNCTION],
    },
    "TRL, tools as JSON": {
        "messages": [
            SYSTEM,
            ASK,
            {"role": "assistant", "thinking": REASONING, "tool_calls": [{"type": "function", "function": CALL}]},
            {"role": "tool", "name": "weather", "content": RESULT},
            TELL,
        ],
        "tools": json.dumps([TOOL]),
    },
    "TRL, prompt and completion": {"prompt": [SYSTEM, ASK], "completion": [CALLS, TOLD, TELL], "tools": [TOOL]},
    "ShareGPT": {
        "system": SYSTEM["content"],
        "conversations": [
            {"from": "human", "value": ASK["content"]},
            {"from": "function_call", "value": f"<think>\n{REASONING}\n</think>\n\n{json.dumps(CALL)}"},
            {"from": "observation", "value": RESULT},
            {"from": "gpt", "value": ANSWER},
        ],
        "tools": json.dumps([FUNCTION]),
    },
    "LLaMA-Factory v1": {
        "messages": [
            {"role": "system", "content": [part("text", SYSTEM["content"])], "loss_weight": 0.0},
            {"role": "user", "content": [part("text", ASK["content"])], "loss_weight": 0.0},
            {
                "role": "assistant",
                "content": [part("reasoning", REASONING), part("tool_call", json.dumps(CALL))],
                "loss_weight": 1.0,
            },
            {"role": "tool", "content": [part("text", RESULT)], "loss_weight": 0.0},
            {"role": "assistant", "content": [part("text", ANSWER)], "loss_weight": 1.0},
        ],
        "tools": json.dumps([FUNCTION]),
    },
}
TRAINED = [
    f'<think>\n{REASONING}\n</think>\n\n<tool_call>\n{{"name": "weather", "arguments": {{"city": "Paris"}}}}\n'
    "</tool_call><|im_end|>",
    f"{ANSWER}<|im_end|>",
]


def example(row: dict, kind: str = "conversation", **options):
    return to_example(row, DatasetConfig(path="x.jsonl", **options), kind)


def documents(row: dict, kind: str = "conversation") -> list[tuple[str, list[str]]]:
    """Return the text of each document of a row, and its targets as consecutive pieces."""
    template = Template(tiny_tokenizer())
    read = []
    for document in encode(example(row, kind), template, TruncationConfig(4096)):
        pieces, before = [], False
        for token, is_target in zip(document.ids, document.mask):
            if is_target and not before:
                pieces.append([])
            if is_target:
                pieces[-1].append(token)
            before = is_target
        read.append((template.tokenizer.decode(document.ids), [template.tokenizer.decode(piece) for piece in pieces]))
    return read


@pytest.mark.parametrize("name", ROWS)
def test_every_format_gives_the_same_text(name):
    """Reasoning, calls and answers are trained on; system prompt, tools and results are read."""
    ((text, trained),) = documents(ROWS[name])
    assert trained == TRAINED
    assert (text, trained) == documents(ROWS["OpenAI"])[0]
    assert all(each in text for each in (SYSTEM["content"], '"description": "Get the weather."', RESULT))
    assert not example(ROWS[name]).unread


OTHER_CALL = CALLS | {"tool_calls": [OPENAI_CALL | {"function": CALL | {"arguments": {"city": "Rome"}}}]}
PREFERENCES = {
    "OpenAI": {
        "input": {"messages": [SYSTEM, ASK], "tools": [TOOL]},
        "preferred_output": [CALLS],
        "non_preferred_output": [TELL],
    },
    "TRL, explicit prompt": {"prompt": [SYSTEM, ASK], "chosen": [CALLS], "rejected": [TELL], "tools": [TOOL]},
    "TRL, implicit prompt": {"chosen": [SYSTEM, ASK, CALLS], "rejected": [SYSTEM, ASK, TELL], "tools": [TOOL]},
    "ShareGPT": {
        "system": SYSTEM["content"],
        "conversations": [{"from": "human", "value": ASK["content"]}],
        "chosen": {"from": "function_call", "value": f"<think>{REASONING}</think>{json.dumps(CALL)}"},
        "rejected": {"from": "gpt", "value": ANSWER},
        "tools": json.dumps([FUNCTION]),
    },
    "LLaMA-Factory v1": {
        "chosen_messages": ROWS["LLaMA-Factory v1"]["messages"][:3],
        "rejected_messages": [*ROWS["LLaMA-Factory v1"]["messages"][:2], ROWS["LLaMA-Factory v1"]["messages"][-1]],
        "tools": [FUNCTION],
    },
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_call_is_better_than_an_answer(name):
    """The chosen response calls, the rejected one answers; sft trains on the call."""
    chosen, rejected = documents(PREFERENCES[name], "preference")
    assert chosen[1] == TRAINED[:1] and rejected[1] == TRAINED[1:]
    assert chosen == documents(PREFERENCES["OpenAI"], "preference")[0]
    assert documents(PREFERENCES[name]) == [chosen]


def test_responses_that_differ_in_a_call_only():
    """Two calls of one function with other arguments; the same call twice is not a preference."""
    row = {"prompt": [SYSTEM, ASK], "chosen": [CALLS], "rejected": [OTHER_CALL], "tools": [TOOL]}
    chosen, rejected = documents(row, "preference")
    assert chosen[1][0].replace("Paris", "Rome") == rejected[1][0]
    with raises(DataError, "same-answers", "chosen"):
        example(row | {"rejected": [CALLS]}, "preference")


def test_a_prompt_with_calls():
    """Calls of the prompt are read, those of the completion are trained on; each result has the id of its call."""
    row = {"prompt": [ASK, CALLS, TOLD, TELL, ASK], "completion": [TELL], "tools": [TOOL]}
    ((text, trained),) = documents(row)
    assert trained == TRAINED[1:] and text.count(TRAINED[0]) == 1
    unnumbered = [{"type": "function", "function": CALL | {"arguments": {"city": city}}} for city in ("Paris", "Rome")]
    turn = {"role": "assistant", "content": "", "tool_calls": unnumbered}
    result = {"role": "tool", "content": RESULT}
    template = Template(tiny_tokenizer(), chat_template="chatml")
    template.renderer.source = (
        "{% for m in messages %}{{ m['role'] }} {{ m['tool_call_id'] }} {{ m['content'] }}"
        "{% for call in m['tool_calls'] %}{{ call['id'] }},{% endfor %}{{ '\\n' }}{% endfor %}"
    )
    text = template.tokenizer.decode(template.encode_prompt([ASK, turn, result, result, turn]))
    assert text.splitlines()[1:] == [
        "assistant  call00001,call00002,",
        f"tool call00001 {RESULT}",
        f"tool call00002 {RESULT}",
        "assistant  call00003,call00004,",
    ]


def test_parallel_calls_of_consecutive_turns():
    """Calls after a turn of the assistant join it, unless they have another weight or reasoning of their own."""
    call = {"from": "function_call", "value": json.dumps(CALL)}
    turns = [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "Let me see."}, call, call]
    (_, message) = example({"conversations": turns}).messages
    assert message["content"] == "Let me see." and len(message["tool_calls"]) == 2
    for other in ({"weight": 0}, {"value": f"<think>Hm.</think>{call['value']}"}):
        messages = example({"conversations": [*turns[:3], call | other]}).messages
        assert [len(each.get("tool_calls", ())) for each in messages] == [0, 1, 1]


@pytest.mark.parametrize("key", ["weight", "loss_weight", "train", "training", "loss"])
def test_weights_by_any_name(key):
    """A turn of weight 0 is read and not trained on, whatever the library calls it."""
    row = {"messages": [ASK, TELL | {key: False}, ASK, TELL]}
    ((text, trained),) = documents(row)
    assert trained == TRAINED[1:] and text.count(ANSWER) == 2
    row["messages"][1][key] = True
    assert documents(row)[0][1] == TRAINED[1:] * 2


def test_a_loss_that_is_a_number_is_not_a_weight():
    """`loss` may be the value of a loss: it is counted as a key that nothing reads."""
    (_, message) = example({"messages": [ASK, TELL | {"loss": 2.5}]}).messages
    assert message == TELL | {"loss": 2.5}


def test_keys_that_nothing_reads_are_listed():
    """Options of a request, of the row and inside `input`; keys of parts."""
    row = ROWS["OpenAI"] | {"parallel_tool_calls": False, "source": "web", "images": []}
    assert example(row).unread == ["parallel_tool_calls", "source"]
    row = PREFERENCES["OpenAI"]
    row = row | {"input": row["input"] | {"parallel_tool_calls": True}, "id": 7}
    assert example(row, "preference").unread == example(row).unread == ["input.parallel_tool_calls", "id"]
    parts = [{"type": "text", "text": "ask", "cache_control": {"type": "ephemeral"}, "image": None}]
    messages = example({"messages": [ASK | {"content": parts}, TELL]}).messages
    assert [key for each in messages for key in Template(tiny_tokenizer()).renderer.unread_keys(each)] == [
        "content.cache_control"
    ]


@pytest.mark.parametrize(
    "content, words",
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], "image_url"),
        ([part("text", "Look:"), {"type": "image"}], "content[1]"),
        ([{"type": "tool_use", "name": "weather", "input": {}}], "tool_use"),
        ([part("tool_call", json.dumps(CALL)), part("text", "I called.")], "order"),
        ([part("text", "So."), part("reasoning", "Hm.")], "order"),
        ([part("tool_call", "not JSON")], "content[0]"),
        ([{"type": "text"}], "content[0]"),
    ],
)
def test_parts_that_are_refused(content, words):
    """Images and other types by their name, and parts that templates would write in another order."""
    with raises(DataError, "invalid-row", words):
        example({"messages": [ASK, {"role": "assistant", "content": content}]})


def test_what_cannot_be_trained_on_is_refused():
    """Columns of images, weights of parts of a turn, and calls both as a key and in the content."""
    with raises(DataError, "invalid-row", "images"):
        example(ROWS["OpenAI"] | {"images": ["cat.png"]})
    detail = {"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]}
    with raises(DataError, "invalid-row", "train_detail"):
        example({"messages": [ASK, TELL | detail]})
    with raises(DataError, "invalid-row", "tool_calls"):
        example({"messages": [ASK, CALLS | {"content": [part("tool_call", json.dumps(CALL))]}]})
    with raises(DataError, "invalid-row", "input"):
        example(PREFERENCES["OpenAI"] | {"input": [ASK]}, "preference")
    with raises(DataError, "no-answer", "completion"):
        example({"prompt": [ASK], "completion": [ASK]})


def test_results_that_are_not_text():
    """A result that is an object or a list becomes JSON; a list of parts is text."""
    for content, text in (([1, 2], "[1, 2]"), ({"a": 1}, '{"a": 1}'), ([part("text", "x")], "x"), ([], "")):
        row = {"messages": [ASK, CALLS, TOLD | {"content": content}, TELL], "tools": [TOOL]}
        assert example(row).messages[2]["content"] == text, content


def test_system_of_any_format():
    """A column `system` is the first turn, whatever the other columns are."""
    for row in (
        {"messages": [ASK, TELL]},
        {"conversations": [ASK, TELL]},
        {"prompt": ASK["content"], "completion": ANSWER},
        {"prompt": [ASK], "completion": [TELL]},
        {"question": ASK["content"], "answer": ANSWER},
    ):
        assert example(row | {"system": SYSTEM["content"]}).messages == [SYSTEM, ASK, TELL], row


def test_nulls_that_a_table_fills_in():
    """Parquet gives each object all keys of the column; those that are null are not of the row."""
    pyarrow = pytest.importorskip("pyarrow")
    from minitrain.data.tables import _row

    calls = [CALL | {"arguments": {"city": "Paris"}}, CALL | {"arguments": {"day": "today"}}]
    table = pyarrow.Table.from_pylist([{"calls": calls}])
    (row,) = table.to_pylist()
    assert row["calls"][0]["arguments"] == {"city": "Paris", "day": None}
    assert _row(row, {}) == {"calls": calls}
