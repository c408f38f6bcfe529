"""`minitrain inspect` shows the fields of rows: reasoning, calls, results, weights, turns and unused keys."""

import json
import re

import pytest

from minitrain.cli.main import main
from tests.conftest import ROOT, SHARED

# Writes reasoning only in the last turn, like Qwen3.
LAST_THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [{"name": name, "description": "d", "parameters": {}} for name in ("add", "sub")]
CALLS = [{"function": {"name": name, "arguments": {"a": 1, "b": "two"}}} for name in ("add", "sub")]
AGENT = {
    "messages": [
        {"role": "user", "content": "add and sub"},
        {"role": "assistant", "content": "both:", "reasoning_content": "I add, I sub", "tool_calls": CALLS},
        {"role": "tool", "content": "add\n3"},
        {"role": "tool", "content": "<|im_end|>sub"},
        {"role": "assistant", "content": "<think>\nnow I know\n</think>\n\n3"},
    ],
    "tools": TOOLS,
}
WEIGHTED = {
    "messages": [
        {"role": "user", "content": "a", "mood": "good"},
        {"role": "assistant", "content": "first", "weight": 0},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "second", "weight": 0.5},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "third"},
    ],
    "id": 7,
}


@pytest.fixture
def inspect(tmp_path, capsys):
    """``inspect(rows, key=value, ...)``: what the command prints of these rows, after the legend."""

    def inspect(rows: list[dict], **options) -> str:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = {"datasets": [str(tmp_path / "rows.jsonl")], "model": {"name_or_path": "tiny"}, "max_length": 4096}
        (tmp_path / "c.yml").write_text(json.dumps(config | {"cache_dir": str(tmp_path / "cache")} | options))
        assert main(["inspect", str(tmp_path / "c.yml")]) == 0, capsys.readouterr().err
        legend, _, out = capsys.readouterr().out.partition("\n")
        assert legend.startswith("⟦trained on")
        return out

    return inspect


def fields(out: str) -> list[tuple[str, str]]:
    """Return (field, text) of each field, as JSON's objects and line ends are shown."""
    return re.findall(r"«(\w+): (.*?)»", out.replace("↵\n    ", "\n"), re.S)


CALL = '{{"name": "{}", "arguments": {{"a": 1, "b": "two"}}}}'
AGENT_FIELDS = [
    ("reasoning", "I add, I sub"),
    ("call", CALL.format("add")),
    ("call", CALL.format("sub")),
    ("result", "add\n3"),
    ("result", "<|im_end|>sub"),
    ("reasoning", "now I know"),
]


def test_fields_of_an_agent(inspect):
    """Parallel calls, each with its syntax; the same words in the prompt, in tools and in results are not marked."""
    out = inspect([AGENT])
    assert fields(out) == AGENT_FIELDS
    assert "⟦<think>↵\n    «reasoning: I add, I sub»↵\n    </think>↵\n    ↵\n    both:↵\n    <tool_call>↵\n" in out
    assert "keys that are not used" not in out


def test_reasoning_that_is_not_trained_on(inspect):
    out = inspect([AGENT], train_on_reasoning=False)
    assert fields(out) == AGENT_FIELDS and "⟧«reasoning: I add, I sub»⟦" in out and "⟧«reasoning: now I know»⟦" in out


def test_a_truncated_prompt(inspect):
    """What truncation left is found, also of a field that it cut, and with the calls out of the loss."""
    found = fields(inspect([AGENT], max_length=140, train_on="last_turn"))
    assert found[-3:] == AGENT_FIELDS[-3:] and len(found) < len(AGENT_FIELDS)
    assert fields(inspect([AGENT], max_length=47, train_on="last_turn"))[:1] == [("result", "sub")]


def test_weights_and_unused_keys(inspect):
    out = inspect([WEIGHTED])
    assert fields(out) == [("answer", "first")]
    assert "⟦×0.5 second<|im_end|>⟧" in out and "⟦third<|im_end|>⟧" in out
    assert out.count("; keys that are not used: id, mood\n") == 1


def test_each_turn_names_its_turns(inspect, tmp_path):
    (tmp_path / "t.jinja").write_text(LAST_THOUGHT)
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"text {i}"} for i in range(6)]
    turns[1]["reasoning_content"], turns[5]["reasoning_content"] = "why 1", "why 5"
    options = {"train_on": "each_turn", "packing": True, "chat_template": str(tmp_path / "t.jinja")}
    out = inspect([{"messages": turns}], **options)
    names = [(turns, n) for turns, n in re.findall(r"rows\.jsonl:1, (turns? [\d and]+ of 6): .*?(after .*)?\n", out)]
    assert [turns for turns, _ in names] == ["turns 4 and 6 of 6", "turn 2 of 6"]
    assert not names[0][1] and names[1][1].startswith("after the shared tokens 0 to ")
    assert fields(out) == [("answer", "text 1"), ("reasoning", "why 5"), ("reasoning", "why 1")]
    assert "⟦<think>«reasoning: why 1»</think>text 1<|im_end|>⟧" in out


def test_preferences(inspect):
    prompt, (answer, *_) = AGENT["messages"][:1], AGENT["messages"][1:]
    rejected = [{"role": "assistant", "content": "no", "reasoning_content": "too hard"}]
    row = {"prompt": prompt, "chosen": [answer], "rejected": rejected, "tools": TOOLS, "source": "x"}
    out = inspect([row], loss={"name": "dpo"}, packing=True)
    assert fields(out) == [*AGENT_FIELDS[:3], ("reasoning", "too hard")]
    assert out.count("keys that are not used: source") == 2


def test_a_tokenizer_that_changes_spaces(inspect):
    folder = SHARED / "tokenizers" / "mistral-v3"
    if not folder.exists():
        pytest.skip("no real tokenizers")
    model = {"name_or_path": "tiny", "tokenizer_name_or_path": str(folder)}
    out = inspect([WEIGHTED], model=model)
    assert fields(out) == [("answer", "first")] and "×0.5" in out
    out = inspect([AGENT | {"tools": []}], model=model, chat_template="chatml", max_length=60, train_on="last_turn")
    assert "    <s>" in out and fields(out)[-2:] == AGENT_FIELDS[-2:]  # after the BOS that truncation keeps


def test_the_page_shows_what_is_printed(tmp_path, monkeypatch, capsys):
    """The outputs in docs/data.md."""
    call = {"function": {"name": "add", "arguments": {"a": 34, "b": 15}}}
    agent = [
        {"role": "user", "content": "What is 34 + 15?"},
        {"role": "assistant", "content": "", "reasoning_content": "A sum.", "tool_calls": [call]},
        {"role": "tool", "content": "49"},
        {"role": "assistant", "content": "49"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes.", "weight": 0.5},
    ]
    greetings = [{"prompt": "Hi", "response": response} for response in ("Hello!", "Hey.")]
    files = {"chats": [{"id": 7, "messages": agent}, greetings[0], greetings[0]], "held-out": greetings}
    monkeypatch.chdir(tmp_path)
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"datasets": ["chats.jsonl"], "eval_datasets": ["held-out.jsonl"], "model": {"name_or_path": "tiny"}}
    (tmp_path / "c.yml").write_text(json.dumps(config | {"seed": 1}))
    page = (ROOT / "docs" / "data.md").read_text()
    assert main(["inspect", "c.yml", "--overrides", "datasets=[{path: chats.jsonl, n_examples: 1}]"]) == 0
    assert capsys.readouterr().out in page
    assert main(["validate", "c.yml"]) == 0
    report = capsys.readouterr().out.splitlines()
    names = ("fields", "unused keys", "duplicates", "leaks", "same prompts", "warning")
    lines = [line for line in report if line.startswith(tuple(f"  {name} " for name in names))]
    assert len(lines) == len(names) and "\n".join(lines) in page
