"""Turns of rows -> messages: each way to write a call, a result, reasoning and a weight is read as the same."""

import json

import pytest

from minitrain.data.messages import is_trained_on, number_calls, parse_messages, parse_tools, split_reasoning
from minitrain.errors import DataError
from tests.data.test_families import answer, documents, user
from tests.messages import raises

FLAT = {"name": "add", "arguments": {"a": 1, "b": "é"}}
AS_JSON = FLAT | {"arguments": json.dumps(FLAT["arguments"])}
NESTED = {"type": "function", "function": FLAT}
ASK = {"role": "user", "content": "q"}


def read(turn: dict) -> dict:
    return parse_messages([ASK, turn], "messages")[1]


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": "", "tool_calls": [NESTED]},
        {"role": "assistant", "content": None, "tool_calls": [NESTED]},
        {"role": "assistant", "tool_calls": [NESTED]},
        {"role": "assistant", "tool_calls": [FLAT]},
        {"role": "assistant", "tool_calls": [AS_JSON]},
        {"role": "assistant", "tool_calls": [{"function": AS_JSON}]},
        {"role": "assistant", "tool_calls": [{"function": json.dumps(FLAT)}]},
        {"role": "assistant", "tool_calls": [{"name": "add", "parameters": FLAT["arguments"]}]},
        {"role": "assistant", "tool_calls": FLAT},
        {"role": "assistant", "tool_calls": json.dumps([NESTED])},
        {"role": "assistant", "tool_calls": [json.dumps(FLAT)]},
        {"role": "assistant", "function_call": AS_JSON},
        {"role": "assistant", "function_call": AS_JSON, "tool_calls": None},
        {"from": "gpt", "value": "", "tool_calls": [FLAT]},
        {"from": "function_call", "value": json.dumps(FLAT)},
        {"from": "function_call", "value": json.dumps([FLAT])},
        {"role": "function_call", "content": json.dumps(AS_JSON)},
        {"role": "function_call", "content": FLAT},
    ],
    ids=lambda turn: json.dumps(turn)[:70],
)
def test_ways_to_write_a_call(turn):
    assert read(turn) == {"role": "assistant", "content": "", "tool_calls": [NESTED]}


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_a_call_without_arguments(arguments):
    message = read({"role": "assistant", "tool_calls": [{"name": "now", "arguments": arguments}]})
    assert message["tool_calls"][0]["function"] == {"name": "now", "arguments": {}}


@pytest.mark.parametrize(
    "calls", ["add(1)", [{"arguments": {}}], [{"name": ""}], [{"name": "f", "arguments": "[1]"}], [3], [{"name": 1}]]
)
def test_calls_that_are_refused(calls):
    with raises(DataError, "invalid-row", "messages[1]"):
        read({"role": "assistant", "tool_calls": calls})


@pytest.mark.parametrize("role", ["tool", "observation", "function", "ipython"])
def test_results_by_any_role(role):
    turn = {"role": role, "content": "3", "name": "add"}
    assert read(turn) == {"role": "tool", "content": "3", "name": "add"}


def test_ids_of_calls_and_results():
    """Those of a row stay; others are numbered, and results have them in order."""
    calls = [NESTED | {"id": "c1"}, NESTED, NESTED]
    results = [{"role": "tool", "content": "3", "tool_call_id": "c1"}, *[{"role": "tool", "content": "3"}] * 2]
    more = [{"role": "assistant", "content": "", "tool_calls": [NESTED]}, results[1]]
    messages = number_calls([ASK, {"role": "assistant", "content": "", "tool_calls": calls}, *results, *more])
    assert [call["id"] for call in messages[1]["tool_calls"]] == ["c1", "call00002", "call00003"]
    ids = [message["tool_call_id"] for message in messages if message["role"] == "tool"]
    assert ids == ["c1", "call00002", "call00003", "call00004"]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_by_any_name(key):
    message = read({"role": "assistant", "content": "a", key: "hmm"})
    assert message == {"role": "assistant", "content": "a", "reasoning_content": "hmm"}
    assert read({"role": "assistant", "content": "a", key: " "}) == {"role": "assistant", "content": "a"}


def test_reasoning_in_the_content():
    for content in ("<think>hmm</think>a", "<think>\nhmm\n</think>\n\na", "hmm</think>a"):
        assert split_reasoning({"content": content}) == ("hmm", "a")
    assert split_reasoning({"content": "a", "reasoning_content": "hmm"}) == ("hmm", "a")


def test_reasoning_that_is_given_twice():
    message = read({"role": "assistant", "content": "a", "reasoning": "hmm", "thinking": "hmm"})
    assert message["reasoning_content"] == "hmm"
    for other in ("no", 3):
        with raises(DataError, "invalid-row", "messages[1]", repr(other)):
            read({"role": "assistant", "content": "a", "reasoning": "hmm", "thinking": other})


@pytest.mark.parametrize("key", ["weight", "loss_weight", "train"])
@pytest.mark.parametrize(("value", "weight"), [(0, 0.0), (False, 0.0), (0.5, 0.5), (1, None), (True, None)])
def test_weights(key, value, weight):
    """A weight of 1 is none; 0 is not trained on."""
    message = read({"role": "assistant", "content": "a", key: value})
    assert message.get("weight") == weight and is_trained_on(message) == (value != 0)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "0.5", [1]])
def test_weights_that_are_refused(value):
    with raises(DataError, "invalid-row", "messages[1].weight"):
        read({"role": "assistant", "content": "a", "weight": value})


@pytest.mark.parametrize(("source", "role"), [("developer", "developer"), ("system", "system")])
def test_developer(source, role):
    """It is the system for templates that do not know it."""
    template = (
        f"{{# {source} #}}{{% for m in messages %}}{{{{ '<|im_start|>' + m.role + ' ' + m.content + '<|im_end|>' }}}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
    )
    ((text, _),) = documents(template, {"role": "developer", "content": "d"}, user("q"), answer("a"))
    assert text.startswith(f"<|im_start|>{role} d<|im_end|>")


@pytest.mark.parametrize("tools", [[FLAT], json.dumps([FLAT]), [json.dumps(FLAT)], FLAT, [NESTED]])
def test_ways_to_write_tools(tools):
    assert parse_tools(tools, "tools") == [NESTED]


@pytest.mark.parametrize("tools", ["add", 3, [{"function": {}}], [{"description": "d"}]])
def test_tools_that_are_refused(tools):
    with raises(DataError, "invalid-row", "tools"):
        parse_tools(tools, "tools")
