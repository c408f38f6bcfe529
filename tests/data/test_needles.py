"""Each field of a row is in the text, or the row is refused and the field named; or it is counted."""

import pytest

from minitrain.data.needles import lost_context, lost_fields
from minitrain.errors import DataError
from tests.chat_templates import TOOLS, call, turn
from tests.data.test_families import answer, documents, make_template, user
from tests.messages import raises
from tests.small_templates import QWEN3

CALL = "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ '<call>' + c.function | tojson }}{% endfor %}{% endif %}"
FULL = (
    "{{ tools | tojson if tools }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}"
    + CALL
    + "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Template without one field -> what the error names, and the key that counts it.
WITHOUT = {
    "reasoning": (FULL.replace("{{ '<think>' + m.reasoning_content + '</think>' }}", ""), "turn 2 of 4", "reasoning"),
    "content": (FULL.replace("{{ m.content }}", "{{ m.content if not m.tool_calls }}"), "turn 2 of 4", "content"),
    "call": (FULL.replace(CALL, ""), "turn 2 of 4", "call of get_weather"),
    "second call": (FULL.replace("in m.tool_calls %}", "in m.tool_calls[:1] %}"), "turn 2 of 4", "call of get_time"),
    "arguments": (FULL.replace("c.function | tojson", "c.function.name"), "turn 2 of 4", "arguments of get_weather"),
    "tool": (
        FULL.replace("tools | tojson if tools", "''"),
        "the prompt",
        "tool get_weather",
    ),  # its name is in the call
    "result": (FULL.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' }}"), "the prompt", "tool turn"),
}
TURNS = (
    user("Weather?"),
    answer(
        "I look", reasoning_content="I should call.", tool_calls=[call("get_weather", city="Rome é"), call("get_time")]
    ),
    turn("tool", "21 degrees"),
    answer("It is warm"),
)


def test_a_template_that_writes_all():
    ((text, counts),) = documents(FULL, *TURNS, tools=TOOLS)
    assert counts == {} and '⟦<think>I should call.</think>I look<call>{"name": "get_weather"' in text


@pytest.mark.parametrize("name", WITHOUT)
def test_a_field_that_the_template_loses(name):
    """The error names the turn and the field."""
    source, where, field = WITHOUT[name]
    assert source != FULL
    with raises(DataError, "lost-field", where, field):
        documents(source, *TURNS, tools=TOOLS)


@pytest.mark.parametrize("name", WITHOUT)
def test_a_lost_field_is_counted(name):
    """With on_missing=warn, the rest is trained on, and counts are by field, not by the names of functions."""
    source, _, field = WITHOUT[name]
    ((text, counts),) = documents(source, *TURNS, tools=TOOLS, on_missing="warn")
    key = "lost:" + field.split(" ")[0] if name != "result" else "lost:content"
    assert set(counts) == {key} and "⟦It is warm<|im_end|>⟧" in text


@pytest.mark.parametrize("content", ["<think>\nI think.\n</think>\n\nIt is warm", "\n It is warm\n"])
def test_an_earlier_turn_of_which_the_template_writes_the_answer(content):
    """Its answer is trained on; it is the reasoning that is lost, not the content."""
    source = FULL.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] | trim }}")
    turns = user("q"), answer(content), user("q"), answer("It is cold")
    ((text, counts),) = documents(source, *turns, on_missing="warn")
    assert "⟦It is warm<|im_end|>⟧" in text and "⟦It is cold<|im_end|>⟧" in text
    assert {key for key in counts if key != "other-prompts"} == ({"lost:reasoning"} if "think" in content else set())


def test_reasoning_that_is_there_twice():
    """As where a template writes it from two keys (trl#6361)."""
    thought = "{{ '<think>' + m.reasoning_content + '</think>' }}"
    with raises(DataError, "lost-field", "turn 2 of 4", "twice"):
        documents(FULL.replace(thought, thought + thought), *TURNS, tools=TOOLS)
    message = answer("I should think so.", reasoning_content="I should think")
    assert lost_fields(message, "<think>I should think</think>I should think so.") == []


def test_calls_of_the_history_are_read():
    """An earlier turn that is not trained on may lose its reasoning, but not its call."""
    assert lost_context({1: TURNS[1]}, [], 'I look get_weather {"city": "Rome \\u00e9"} get_time') == []
    with raises(DataError, "lost-field", "the prompt", "of get_weather"):
        documents(WITHOUT["call"][0], *TURNS, tools=TOOLS, train_on="last_turn")


SHORT = {
    "the second of two that are the same": ("second call", ("", call("f"), call("f")), "call of f"),
    "a name that is in the content": ("call", ("if so", call("f")), "call of f"),
    "arguments that are in the name": ("arguments", ("", call("far", a="f")), "arguments of far"),
    "arguments that are in the content": ("arguments", ("a: 1", call("f", a=1)), "arguments of f"),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_value_is_not_found_in_another_one(name):
    """A value must be there as often as the row has it, or short ones would always be found."""
    template, (content, *calls), lost = SHORT[name]
    row = user("q"), answer(content, tool_calls=calls)
    assert documents(FULL, *row)[0][1] == {}
    with raises(DataError, "lost-field", "turn 2 of 2", lost):
        documents(WITHOUT[template][0], *row)


def test_a_call_of_the_history_is_not_found_in_the_list_of_tools():
    row = user("q"), answer("It is.", tool_calls=[call("get_time")]), turn("tool", "9"), answer("9")
    with raises(DataError, "lost-field", "the prompt", "call of get_time"):
        documents(WITHOUT["call"][0], *row, tools=TOOLS, train_on="last_turn")


@pytest.mark.parametrize("other", ['{"k": "v"}', '"v"', '", "', "v", ""])
def test_a_value_that_is_the_text_of_another_one(other):
    calls = [call("f", a={"k": "v"}), call("f", b=other, c=[other, other])]
    ((_, counts),) = documents(FULL, user("q"), answer("v", reasoning_content="v", tool_calls=calls))
    assert counts == {}


@pytest.mark.parametrize("value", [["it's"], {"k": 'it\'s\u00a0a "b"'}, "a\\b\n"])
def test_arguments_as_python_writes_them(value):
    """As in templates whose calls are Python, such as `[f(x=['a'])]`."""
    arguments = "c.function.name }}{% for k, v in c.function.arguments | items %}{{ k ~ [v] }}{% endfor %}{{ ''"
    source = FULL.replace("c.function | tojson", arguments)
    ((text, counts),) = documents(source, user("q"), answer("", tool_calls=[call("f", x=value)]))
    assert counts == {} and f"<call>fx[{value!r}]" in text


@pytest.mark.parametrize("value", ['a"b', "a\nb", "é", "\\", 1, 1.5, True, None, {"k": ["v", {"w": 2}]}, []])
def test_arguments_of_every_kind(value):
    """They are found as JSON writes them."""
    ((text, counts),) = documents(FULL, user("q"), answer("", tool_calls=[call("f", x=value)]))
    assert counts == {} and "⟦<call>" in text


def test_keys_that_the_template_reads_are_used():
    """The others are counted as unread, each with the turns that have it."""
    renderer = make_template(FULL.replace("{{ m.content }}", "{{ m.content }}{{ m.mood }}")).renderer
    assert [*renderer.unread_keys(user("q") | {"mood": "good", "speaker": "ann"})] == ["speaker"]


def test_reasoning_that_is_not_trained_on_may_be_left_out():
    """A history without thoughts is refused only where the thoughts are to be trained on."""
    turns = [user("q"), answer("a", reasoning_content="I think so."), user("r"), answer("b", reasoning_content="So.")]
    ((_, counts),) = documents(QWEN3, *turns, train_on_reasoning=False)
    assert counts["lost:reasoning"] == 1
    with raises(DataError, "lost-field", "reasoning"):
        documents(QWEN3, *turns)
