"""Row formats: how each is recognized, and which rows are refused."""

import pytest

from minitrain.config.sections import DatasetConfig
from minitrain.data.examples import PlainText, row_formats_of, to_example
from minitrain.data.files import read_rows
from minitrain.errors import DataError
from tests.messages import raises


def record(row: dict, **options):
    return to_example(row, DatasetConfig(path="x.jsonl", **options))


def turns(row: dict, **options) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in record(row, **options).messages]


PAIR = [("user", "ask"), ("assistant", "tell")]
ROWS = {
    "chosen": {"prompt": "ask", "chosen": "tell", "rejected": "lie"},
    "chosen_of_messages": {"prompt": "ask", "chosen_messages": "tell", "rejected_messages": "lie"},
    "preferred_output": {"input": {"prompt": "ask"}, "preferred_output": "tell", "non_preferred_output": "lie"},
    "messages": {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "tell"}]},
    "conversations": {"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "tell"}]},
    "prompt_response": {"prompt": "ask", "response": "tell"},
    "prompt_completion": {"prompt": "ask", "completion": "tell"},
    "alpaca": {"instruction": "ask", "input": "", "output": "tell"},
    "question_answer": {"question": "ask", "answer": "tell"},
    "query_response": {"query": "ask", "response": "tell"},
    "raft": {"question": "ask", "documents": [{"type": "oracle", "text": "It."}], "teacher_answer": "tell"},
    "raft_context": {
        "question": "ask",
        "context": {"sentences": [["It."]]},
        "oracle_context": "It.",
        "cot_answer": "tell",
    },
    "raft_distractors": {"question": "ask", "oracle_context": "It.", "distractors": [], "answer": "tell"},
    "text": {"text": "ask tell"},
}


@pytest.mark.parametrize("told", ["by keys", "by type"])
@pytest.mark.parametrize("name", row_formats_of("conversation"))
def test_schemas(name, told):
    """Each format is recognized by its keys, and by its type."""
    template = "{question}" if name.startswith("raft") else None
    made = record(ROWS[name], type=name if told == "by type" else None, prompt_template=template)
    if template:
        assert [(m["role"], m["content"]) for m in made.messages] == PAIR
        return
    assert made == PlainText("ask tell") if name == "text" else turns(ROWS[name]) == PAIR


def test_type_decides_between_schemas():
    """Where a row fits several schemas, `type` decides."""
    row = ROWS["prompt_response"] | ROWS["text"]
    assert turns(row) == PAIR
    assert record(row, type="text") == PlainText("ask tell")


@pytest.mark.parametrize(
    "keys", [("from", "value"), ("from", "content"), ("role", "content"), ("role", "value")], ids=" ".join
)
@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_names_of_turns(name, keys):
    """from and role, value and content, in either kind."""
    who, what = keys
    assert turns({name: [{who: "human", what: "ask"}, {who: "gpt", what: "tell"}]}) == PAIR


def test_the_better_answer_of_a_preference():
    """In every shape that preferences have; a column with the turns so far is the prompt and not what is learned."""
    so_far = {"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "tell"}] * 2}
    so_far["conversations"].pop()
    row = so_far | {"chosen": {"from": "gpt", "value": "more"}, "rejected": {"from": "gpt", "value": "less"}}
    assert turns(row) == [*PAIR, PAIR[0], ("assistant", "more")]
    both = {"prompt": "ask", "messages": ROWS["messages"]["messages"]}
    sides = {side: [{"role": r, "content": c} for r, c in (PAIR[0], ("assistant", side))] for side in ("a", "b")}
    assert turns(both | {"chosen": sides["a"], "rejected": sides["b"]}) == [PAIR[0], ("assistant", "a")]


def test_roles():
    """Every known name of a role; calls of tools are the assistant's, their results the tool's."""
    names = ["system", "human", "function_call", "observation", "gpt", "user", "assistant", "tool"]
    expected = ["system", "user", "assistant", "tool", "assistant", "user", "assistant", "tool"]
    values = [name if name != "function_call" else '{"name": "f"}' for name in names]
    made = turns({"conversations": [{"from": name, "value": value} for name, value in zip(names, values)]})
    assert made == [(role, "" if name == "function_call" else name) for role, name in zip(expected, names)]


def test_system_beside_the_turns():
    """`system` of a conversation or an alpaca row opens the conversation."""
    assert turns(ROWS["conversations"] | {"system": "be brief"}) == [("system", "be brief"), *PAIR]
    assert turns(ROWS["alpaca"] | {"system": "be brief"}) == [("system", "be brief"), *PAIR]


def test_alpaca_input_and_history():
    """The input stands below the instruction, the history before both."""
    row = {"instruction": "ask", "input": "this", "output": "tell", "history": [["q", "a"]]}
    assert turns(row) == [("user", "q"), ("assistant", "a"), ("user", "ask\nthis"), ("assistant", "tell")]
    assert turns(row | {"input": None, "history": None}) == PAIR


def test_parts_of_text():
    """Contents as a list of text parts are joined."""
    parts = [{"type": "text", "text": "te"}, {"type": "text", "value": "ll"}]
    row = {"messages": [{"role": "user", "content": ["ask"]}, {"role": "assistant", "content": parts}]}
    assert turns(row) == PAIR


def test_columns():
    """`columns` maps any column; what it maps goes before what the row's own keys say."""
    assert turns({"q": "ask", "a": "tell"}, columns={"prompt": "q", "response": "a"}) == PAIR
    row = {"dialog": ROWS["conversations"]["conversations"], "text": "not this"}
    assert turns(row, columns={"conversations": "dialog"}) == PAIR
    assert turns({"question": "ask", "response": "tell"}, columns={"prompt": "question"}) == PAIR


def test_numbers_are_texts():
    """A number in place of a text is written out."""
    assert turns({"prompt": 12, "response": 0.5}) == [("user", "12"), ("assistant", "0.5")]


def test_templates():
    """prompt_template and response_template take any column of the row."""
    row = {"question": "ask", "answer": "tell", "topic": "sums"}
    made = turns(row, prompt_template="[{topic}] {prompt}?", response_template="{response}.")
    assert made == [("user", "[sums] ask?"), ("assistant", "tell.")]
    assert turns(row, prompt_template='{"q": "{question}"}')[0] == ("user", '{"q": "ask"}')


def test_text_of_the_data_is_no_template():
    """Braces in the data stay as they are, and nothing in it is executed (template injection)."""
    hostile = "I am {{name}}, {prompt} {response} {0} {x.__class__} {{ cycler.__init__ }} %s $HOME ${oc.env:HOME} \\1"
    made = turns({"prompt": hostile, "response": hostile}, prompt_template="<{prompt}>", response_template="{response}")
    assert made == [("user", f"<{hostile}>"), ("assistant", hostile)]


@pytest.mark.parametrize(
    ("row", "options", "code", "part"),
    [
        ({"a": 1}, {}, "invalid-row", "columns: {prompt: "),
        ({}, {}, "invalid-row", "columns: {prompt: "),
        ({"prompt": "x"}, {"type": "prompt_response"}, "invalid-row", "'response'"),
        ({"a": "x"}, {"columns": {"prompt": "b"}}, "wrong-column", "'b'"),
        ({"prompt": "x", "response": ""}, {}, "no-answer", "response"),
        ({"prompt": "x", "response": None}, {}, "invalid-row", "response"),
        ({"prompt": ["x"], "response": "y"}, {}, "invalid-row", "prompt"),
        ({"prompt": "x", "response": True}, {}, "invalid-row", "response"),
        ({"prompt": "x", "response": float("nan")}, {}, "invalid-row", "nan"),
        ({"text": ""}, {}, "invalid-row", "text"),
        ({"messages": "x"}, {}, "invalid-row", "messages"),
        ({"messages": []}, {}, "invalid-row", "messages"),
        ({"messages": ["x"]}, {}, "invalid-row", "messages[0]"),
        ({"messages": [{"role": "boss", "content": "x"}]}, {}, "invalid-row", "messages[0]: "),
        ({"messages": [{"role": ["user"], "content": "x"}]}, {}, "invalid-row", "['user']"),
        ({"messages": [{"role": "user"}]}, {}, "invalid-row", "messages[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            {},
            "invalid-row",
            "messages[0]",
        ),
        ({"messages": [{"role": "user", "content": [{"type": ["text"]}]}]}, {}, "invalid-row", "messages[0]"),
        ({"messages": [{"role": "user", "content": [1]}]}, {}, "invalid-row", "messages[0]"),
        ({"messages": [{"role": "user", "content": "x"}]}, {}, "no-answer", "messages"),
        ({"messages": [{"role": "assistant", "content": ""}]}, {}, "no-answer", "messages"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, {}, "invalid-row", "history[0]"),
        (
            {"prompt": "x", "response": "y"},
            {"prompt_template": "{z}"},
            "wrong-column",
            "prompt_template: ",
        ),
        ({"prompt": "x", "response": "y", "z": None}, {"prompt_template": "{z}"}, "invalid-row", "z: "),
        (ROWS["messages"], {"prompt_template": "{prompt}"}, "no-effect", "prompt_template"),
        ({"prompt": "x"}, {}, "invalid-row", "rollout.num_generations"),
    ],
)
def test_bad_rows(row, options, code, part, wording):
    """A row that cannot be used says which part of it, and why."""
    with raises(DataError, code, part) as caught:
        record(row, **options)
    wording(caught.value)


@pytest.mark.parametrize(
    "name",
    ["alpaca_en_demo.json", "identity.json", "glaive_toolcall_en_demo.json", "v1_sft_demo.jsonl"],
)
def test_real_data(shared, name):
    """Every row of real instruction data becomes a conversation, its words unchanged."""
    for _, row in read_rows(shared("data/llamafactory") / name):
        made = turns(row)
        assert {"user", "assistant"} <= {role for role, _ in made}
        if "output" in row:
            assert made[-1] == ("assistant", row["output"])
