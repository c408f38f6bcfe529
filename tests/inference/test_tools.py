"""Prompts with tools, as in training, and responses with reasoning and tool calls, read as the template writes them."""

import io
import json
from pathlib import Path

import pytest

from minitrain.cli.main import main
from minitrain.config.sections import DatasetConfig
from minitrain.data.counts import LOST, UNREAD, UNREAD_ROW
from minitrain.data.examples import to_example
from minitrain.data.messages import count_open_calls
from minitrain.data.template import Template
from minitrain.errors import ConfigError, DataError
from minitrain.inference.evaluation import is_match
from minitrain.inference.generate import Generator, load_generator
from minitrain.inference.parse import Response, ResponseParser, split_calls, split_thought
from minitrain.inference.prompts import make_prompt
from minitrain.model.tiny import tiny_tokenizer
from tests.conftest import random_llama
from tests.messages import raises, reports

# As Qwen3: tools in the system turn, thoughts only after the last question, an empty thought if thinking is off.
QWEN = """\
{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}
{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last %}
{{- '<think>\\n' + (m.reasoning_content or '').strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}
{{- m.content.lstrip('\\n') }}
{%- for call in m.tool_calls or [] %}
{{- '\\n' if m.content or not loop.first }}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor %}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- else %}
{{- '<|im_start|>' + m.role + '\\n' + m.content }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
# As DeepSeek-R1: the prompt opens a thought, and no turn keeps one.
R1 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content.split('</think>')[-1] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
# As Qwen3.5: each argument has tags of its own, which only a response template reads.
XML = QWEN.replace(
    """'<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\\n</tool_call>'""",
    """'<tool_call>\\n<function=' + call.function.name + '>\\n' }}
{%- for key, value in call.function.arguments.items() %}
{{- '<parameter=' + key + '>' + value | string + '</parameter>' }}{%- endfor %}{{- '</function>\\n</tool_call>'""",
)
XML_RESPONSES = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "content": {"close": "<|im_end|>"},
        "reasoning_content": {"open": "<think>\n", "close": "\n</think>"},
        "tool_calls": {
            "open_pattern": r"<tool_call>\s*<function=(?P<name>\w+)>\s*",
            "close_pattern": r"\s*</function>\s*</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<parameter=(?P<key>\w+)>(?P<value>.*?)</parameter>"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
    },
}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Forecast.", "parameters": PARAMETERS}}
USER = {"role": "user", "content": "Oslo?"}


def template(source: str = "chatml", **options) -> Template:
    tokenizer = tiny_tokenizer()
    if source != "chatml":
        special = {"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}
        tokenizer.add_special_tokens(special, replace_extra_special_tokens=False)
        tokenizer.chat_template = source
    return Template(tokenizer, **options)


def call(name: str = "weather", **arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def answer(content: str = "", reasoning: str = "", *calls: dict) -> dict:
    message = {"role": "assistant", "content": content}
    message |= {"reasoning_content": reasoning} if reasoning else {}
    return message | ({"tool_calls": list(calls)} if calls else {})


ANSWERS = [
    answer("Sunny."),
    answer(" two lines\nand {braces} "),
    answer("Sunny.", "It is June.\n\nSo it is."),
    answer("", "", call(city="Oslo")),
    answer("I look.", "", call(city="Oslo", days=3), call(city="Rome")),
    answer("", "I have to look.", call(city="Oslo")),
    answer("I look.", "Hm.", call("time"), call(city='</tool_call>"\n<tool_call>', days=[1.5, None, {"ü": "☃"}])),
]


def functions(message: dict) -> list[dict]:
    return [each["function"] for each in message.get("tool_calls", ())]


@pytest.mark.parametrize("source", ["chatml", QWEN, R1], ids=["chatml", "qwen", "r1"])
@pytest.mark.parametrize("message", ANSWERS)
def test_what_the_template_writes_is_read_back(source, message):
    """The ids that training has as targets give the message again; the oracle is the row itself."""
    if source == R1 and "tool_calls" in message:
        pytest.skip("it has no calls")
    made = template(source, on_missing="warn")  # R1 opens a thought for every answer
    row = {"messages": [USER, message], "tools": [TOOL] * (source != R1)}
    tokens = made.encode(to_example(row, DatasetConfig("")))
    start = tokens.mask.index(True)
    response = ResponseParser(made).parse(tokens.ids[:start], tokens.ids[start:])
    expected = message | ({"tool_calls": functions(message)} if functions(message) else {})
    got = response.message | ({"tool_calls": response.functions} if response.functions else {})
    assert got == expected and response.n_malformed == 0


@pytest.mark.parametrize(
    "text, content, n_calls, n_malformed",
    [
        ('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', "", 1, 0),
        ('a\n<tool_call>{"name": "f"}</tool_call>\nb', "a\n\nb", 1, 0),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", 1, 0),
        ('<tool_call>{"name": "f", "arguments": {}}', None, 0, 1),
        ('<tool_call>{"name": "f", "arguments": {}} x</tool_call>', None, 0, 1),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', None, 0, 1),
        ('<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', None, 0, 1),
        ("<tool_call>{'name': 'f'}</tool_call>", None, 0, 1),
        ("<tool_call>", None, 0, 1),
        ("<tool_call>" + "[" * 100_000, None, 0, 1),
        ('<tool_call>{</tool_call><tool_call>{"name": "f"}</tool_call>', "<tool_call>{</tool_call>", 1, 1),
        ("no call", None, 0, 0),
    ],
)
def test_calls_that_are_malformed_stay_in_the_content(text, content, n_calls, n_malformed):
    """Nothing of a response is lost, and JSON that is not complete is no call."""
    left, calls, malformed = split_calls(text)
    assert (left, len(calls), malformed) == (text if content is None else content, n_calls, n_malformed)


@pytest.mark.parametrize(
    "text, parts",
    [
        ("<think>\na\n</think>\n\nb", ("a", "b")),
        ("\n<think></think>b", ("", "b")),
        ("<think>never ends", ("never ends", "")),
        ("b <think>a</think>", ("", "b <think>a</think>")),
        ("it is </think>", ("", "it is </think>")),
    ],
)
def test_thoughts(text, parts):
    """A thought is at the beginning; one that was cut off leaves no content."""
    assert split_thought(text) == parts


def test_a_response_template_reads_its_own_syntax():
    """Arguments in tags of their own become what the tool's parameters say; without it, calls stay text."""
    made, message = template(XML), answer("I look.", "Hm.", call(city="Oslo", days=3))
    tokens = made.encode(to_example({"messages": [USER, message], "tools": [TOOL]}, DatasetConfig("")))
    start = tokens.mask.index(True)
    ids = tokens.ids[:start], tokens.ids[start:]
    assert not ResponseParser(made).reads_calls
    plain = ResponseParser(made).parse(*ids)
    assert plain.message["content"].startswith("I look.\n<tool_call>") and not plain.functions and not plain.n_malformed
    made.tokenizer.response_template = XML_RESPONSES
    response = ResponseParser(made).parse(*ids, [TOOL])
    assert response.functions == functions(message) and response.text.endswith("</tool_call>")
    assert (response.message["content"].strip(), response.message["reasoning_content"]) == ("I look.", "Hm.")


# -------------------------------------------------------------------------------------------------------- prompts


ROWS = [
    {"messages": [USER, answer("Sunny.")], "tools": [TOOL]},
    {"messages": [USER, answer("Sunny.")], "tools": json.dumps([TOOL["function"]])},
    {"messages": [USER, ANSWERS[5], {"role": "tool", "content": "12 C"}, answer("Cold.", "12.")], "tools": [TOOL]},
    {
        "messages": [USER, answer("Hot.", "June."), USER, answer("Cold.")],
        "chat_template_kwargs": {"enable_thinking": True},
    },
    {"messages": [{"role": "developer", "content": "Be brief."}, USER, answer("Sunny.")]},
    {
        "conversations": [
            {"from": "human", "value": "Oslo?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
            {"from": "observation", "value": "12 C <|im_end|>"},
            {"from": "gpt", "value": "Cold."},
        ],
        "system": "Be brief.",
        "functions": [TOOL["function"]],
    },
    {"prompt": "Oslo?", "response": "Sunny.", "system": "Be brief."},
    {"instruction": "And Rome?", "input": "in June", "output": "Hot.", "history": [["Oslo?", "Cold."]], "system": "Hi"},
]


@pytest.mark.parametrize("source", ["chatml", QWEN], ids=["chatml", "qwen"])
@pytest.mark.parametrize("row", ROWS)
def test_the_prompt_is_the_one_of_training(source, row):
    """A row gives the ids before the answer that is trained on, and no key of it gets lost."""
    made = template(source, train_on="last_turn", on_missing="warn")
    example = to_example(row, DatasetConfig(""))
    tokens = made.encode(example)
    prompt = make_prompt("", row)
    generator = Generator(random_llama(), made)
    assert generator.encode(prompt.messages, prompt.variables) == tokens.ids[: tokens.mask.index(True)]
    assert prompt.unread == [] and prompt.variables == example.variables
    unread = {UNREAD_ROW + "chat_template_kwargs.enable_thinking": 1}  # ChatML has no such argument
    expected = unread if source == "chatml" and "chat_template_kwargs" in row else {}
    assert {k: n for k, n in generator.counts.items() if k.startswith((LOST, UNREAD, UNREAD_ROW))} == expected


def test_a_conversation_that_ends_with_a_result_is_answered():
    """Only a turn of the assistant at the end is the reference."""
    turns = [USER, ANSWERS[3], {"role": "tool", "content": "12 C"}]
    prompts = [make_prompt("", {"messages": messages}).messages for messages in (turns, [*turns, answer("Cold.")])]
    assert prompts[0] == prompts[1] and prompts[0][-1]["role"] == "tool"


def test_tools_that_the_template_leaves_out():
    """They are an error, and a content is counted."""
    made = template("{% for m in messages %}{% if m.role != 'system' %}[{{ m.content }}]{% endif %}{% endfor %}=")
    generator = Generator(random_llama(), made)
    with raises(DataError, "lost-field", "tool weather"):
        generator.encode([USER], {"tools": [TOOL]})
    generator.encode([{"role": "system", "content": "Be brief."}, USER])
    assert generator.counts == {LOST + "content of the system turn": 1}


def test_arguments_in_python(llama_folder, make_trainer):
    """`generate`, `generate_messages`, `Trainer.generate` and `chat` render the same prompts."""
    seen = []

    class Seen(Generator):
        def generate_from_ids(self, prompts, *_, tools, **__):
            seen.append(prompts)
            assert tools == [[TOOL]]
            return [Response("a", answer("a"))] * len(prompts)

    trainer, generator = make_trainer(), load_generator(llama_folder)
    expected = [generator.encode([USER], {"tools": [TOOL]})]
    generator.__class__ = trainer.generator.__class__ = Seen
    assert generator.generate([[USER]], tools=[TOOL["function"]]) == ["a"]
    assert generator.generate_messages([[USER]], tools=[TOOL]) == [answer("a")]
    assert trainer.generate([[USER]], tools=[TOOL]) == ["a"] and trainer.chat([USER], tools=[TOOL]) == "a"
    assert seen == [expected] * 4
    with raises(ConfigError, "wrong-type", "tools[0]: "):
        generator.generate(["a"], tools=[{"type": "function"}])
    with raises(ConfigError, "no-effect", "chat_template_kwargs.enable_thinking: "):
        trainer.generate(["a"], chat_template_kwargs={"enable_thinking": False})


# ------------------------------------------------------------------------------------------------------- commands


CALL_TEXT = (
    '<think>\nHm.\n</think>\n\nI look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
)


@pytest.fixture
def command(tmp_path, llama_folder, monkeypatch, capsys):
    """``command("generate", ...)``: (exit code, stdout, stderr) of a command whose model says `command.says`."""
    monkeypatch.chdir(tmp_path)
    Path("tools.json").write_text(json.dumps([TOOL["function"]]))

    def _generate(self, prompts, *_, **__):
        command.prompts += [self.tokenizer.decode(prompt) for prompt in prompts]
        says = self.tokenizer(command.says.pop(0) if len(command.says) > 1 else command.says[0])["input_ids"]
        return [[*says, *self.end_ids[:1]]] * len(prompts)

    monkeypatch.setattr(Generator, "_generate", _generate)

    def command(name, *arguments: str):
        command.prompts = []
        return main([name, str(llama_folder), *arguments]), *capsys.readouterr()

    command.says = [CALL_TEXT]
    return command


def test_rows_with_tools_and_calls(command):
    """Prompts have the tools of their row or of --tools, the output has the calls, and keys without use are named."""
    rows = [
        {"messages": [USER, answer("Cold.")], "tools": [TOOL | {"function": TOOL["function"] | {"name": "other"}}]},
        {"prompt": "Oslo?", "response": "Cold.", "id": 7},
        {"messages": [USER | {"mood": "good"}], "chat_template_kwargs": {"x": 1}},
    ]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = command("generate", "--input", "p.jsonl", "--tools", "tools.json", "--output", "out.jsonl")
    assert code == 0 and "chat_template_kwargs.x (1), id (1)" in err and "mood (1)" in err and "response" not in err
    assert ['"other"' in prompt for prompt in command.prompts].count(True) == 1
    assert ['"weather"' in prompt for prompt in command.prompts].count(True) == 2
    written = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    for row in written:
        assert row["content"] == "I look." and row["reasoning_content"] == "Hm."
        assert functions(row) == [{"name": "weather", "arguments": {"city": "Oslo"}}]
    assert written[0]["model_response"] == CALL_TEXT and written[1]["response"] == "Cold."
    assert command("generate", "--input", "p.jsonl", "--tools", "tools.json", "--quiet")[2] == ""


def test_responses_without_calls_have_the_same_columns_as_ever(command):
    """`response` alone, but for a file in which another response has more."""
    command.says = ["Cold."]
    assert command("generate", "--prompt", "a", "--output", "out.jsonl")[0] == 0
    assert json.loads(Path("out.jsonl").read_text()) == {"prompt": "a", "response": "Cold."}


def test_malformed_calls_are_reported(command, wording):
    """Text stays text, with a warning."""
    command.says = ["<tool_call>{</tool_call>"]
    code, out, err = command("generate", "--prompt", "a", "--tools", "tools.json")
    assert code == 0 and out == "<tool_call>{</tool_call>\n"
    wording(err)


def test_a_syntax_that_is_not_known(command, wording):
    """The warning says why calls stay text."""
    Path("xml.jinja").write_text(XML)
    code, _, err = command("generate", "--prompt", "a", "--tools", "tools.json", "--chat-template", "xml.jinja")
    assert code == 0
    wording(err)


@pytest.mark.parametrize(
    "content, code, part",
    [
        (None, "unreadable", "--tools: tools.json "),
        (b"{", "invalid-json", "--tools: tools.json "),
        (b"\xff", "invalid-json", "--tools: tools.json "),
        (b"[]", "no-data", "--tools: tools.json "),
        (b'"f"', "invalid-row", "--tools: tools.json"),
        (b"[1]", "invalid-row", "--tools: tools.json[0]"),
        (b'[{"name": "f"}, {"type": "function"}]', "invalid-row", "--tools: tools.json[1]"),
    ],
)
def test_bad_tools(command, wording, content, code, part):
    """A file without tools is refused before the model is loaded, by each command."""
    Path("tools.json").unlink()
    if content is not None:
        Path("tools.json").write_bytes(content)
    status, out, err = command("generate", "--prompt", "a", "--tools", "tools.json")
    wording(err)
    assert status == 2 and out == "" and reports(err, code, part)
    assert command("chat", "--tools", "tools.json")[0] == 2


@pytest.mark.parametrize(
    "argument, code, part",
    [
        ("enable_thinking", "usage", "'enable_thinking'"),
        ("=1", "usage", "'=1'"),
        ("a=[", "usage", "'a=['"),
        ("enable_thinking=false", "no-effect", "chat_template_kwargs.enable_thinking"),
    ],
)
def test_bad_arguments_of_templates(command, wording, argument, code, part):
    status, out, err = command("generate", "--prompt", "a", "--chat-template-kwargs", argument)
    wording(err.rpartition("\nminitrain ")[2])
    assert status == 2 and reports(err, code, part) and out == ""


def test_arguments_of_templates(command):
    """They replace those of training, and those of a row replace them."""
    Path("qwen.jinja").write_text(QWEN)
    rows = [{"prompt": "a"}, {"prompt": "a", "chat_template_kwargs": {"enable_thinking": True}}]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--chat-template", "qwen.jinja", "--chat-template-kwargs", "enable_thinking=false")
    assert command("generate", "--input", "p.jsonl", *given)[0] == 0
    assert [prompt.endswith("</think>\n\n") for prompt in command.prompts] == [True, False]


def test_chat_with_tools(command, monkeypatch):
    """A call waits for its results, the next prompt has both, and a thought is not in the content of the history."""
    two = CALL_TEXT + CALL_TEXT.partition("I look.")[2]
    command.says = [two, "Cold."]
    monkeypatch.setattr("sys.stdin", io.StringIO("/tool early\nOslo?\n/tool 12 C\n/tool 30 C\n/tool late\n/exit\n"))
    code, out, _ = command("chat", "--tools", "tools.json")
    assert code == 0 and out.count("Type another message") == 2 and "Tools: weather. " in out
    assert len(command.prompts) == 2
    first, second = command.prompts
    assert second.startswith(first + two + "<|im_end|>\n<|im_start|>tool\n12 C<|im_end|>\n<|im_start|>tool\n30 C")


def test_open_calls():
    """Those without a result at the end."""
    asked, result = answer("", "", call(), call()), {"role": "tool", "content": "1"}
    talks = [], [USER], [USER, asked], [USER, asked, result], [USER, asked, result, result], [asked, USER], [result]
    assert [count_open_calls(list(talk)) for talk in talks] == [0, 0, 2, 1, 0, 0, 0]


# ------------------------------------------------------------------------------------------------------ evaluation


@pytest.mark.parametrize(
    "said, expected, match, right",
    [
        (answer("4", "2 and 2"), answer("4", "other"), "text", True),
        (answer("4", "5"), answer("5"), "number", False),
        (answer("", "so 5"), answer("5"), "number", False),
        (answer("", "", call(city="Oslo")), answer("", "", call(city="Oslo")), "text", True),
        (answer("", "", call(city="Oslo")), answer("", "", call(city="Rome")), "text", False),
        (answer("I look.", "", call(city="Oslo")), answer("", "", call(city="Oslo")), "text", False),
        (answer("2 more", "", call(city="Oslo")), answer("", "", call(city="Oslo")), "number", True),
        (answer("Oslo"), answer("", "", call(city="Oslo")), "number", False),
        (answer("5", "", call()), answer("5"), "number", False),
        (answer("none"), answer("none"), "number", False),
    ],
)
def test_reasoning_is_not_compared_and_calls_are(said, expected, match, right):
    assert is_match(Response("", said), Response("", expected), match) == right


@pytest.mark.parametrize("train_on_reasoning", ["true", "false"])
def test_exact_match_of_rows_with_tools(make_trainer, tmp_path, monkeypatch, train_on_reasoning):
    """Prompts have the tools of the rows and not the reasoning; a right call after other reasoning counts."""
    rows = [
        {"messages": [USER, answer("I look.", "Let me see.", call(city="Oslo"))], "tools": [TOOL]},
        {"messages": [USER, answer("I look.", "Let me see.", call(city="Rome"))], "tools": [TOOL]},
    ]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = []

    def _generate(self, given, *_):
        prompts.extend(given)
        return [[*self.tokenizer(CALL_TEXT)["input_ids"], self.end_ids[0]]] * len(given)

    monkeypatch.setattr(Generator, "_generate", _generate)
    options = [f"eval_datasets=[{tmp_path}/eval.jsonl]", "eval_generate.n_examples=2"]
    options.append(f"train_on_reasoning={train_on_reasoning}")
    trainer = make_trainer(*options)
    assert trainer.evaluate()["exact_match"] == 0.5
    assert prompts == [trainer.generator.encode([USER], {"tools": [TOOL]})] * 2
