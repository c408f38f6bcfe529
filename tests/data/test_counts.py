"""What is counted of the fields of rows: how many there are, and what becomes of each."""

import dataclasses
from pathlib import Path

import pytest

from minitrain.data import cache as cache_module
from minitrain.data.cache import load_cache
from minitrain.data.counts import describe_fields, describe_unread
from minitrain.data.loader import load_data
from minitrain.data.template import Template
from minitrain.model.tiny import tiny_tokenizer

TOOLS = [{"name": name, "description": "d", "parameters": {}} for name in ("add", "sub")]
# Writes reasoning only in the last turn, like Qwen3, and no documents.
LAST_THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def call(name: str, **arguments) -> dict:
    return {"function": {"name": name, "arguments": arguments}}


def user(content: str, **keys) -> dict:
    return {"role": "user", "content": content, **keys}


def answer(content: str, **keys) -> dict:
    return {"role": "assistant", "content": content, **keys}


ROWS = [
    {
        "messages": [
            user("compute", speaker="ann"),
            answer("", reasoning_content="both of them", tool_calls=[call("add", a=1, b=2), call("sub", a=1, b=2)]),
            {"role": "tool", "content": "3"},
            {"role": "tool", "content": "-1"},
            answer("3 and -1", reasoning_content="both known", weight=0.5),
            user("thanks", mood="good"),
        ],
        "tools": TOOLS,
        "id": 7,
    },
    {"messages": [user("a"), answer("b", weight=0), user("c"), answer("d")], "id": 8, "source": "x"},
    {"prompt": "plain", "response": "text"},
]
ROW_COUNTS = {"rows:tools": 1, "rows:calls": 1, "rows:results": 1, "rows:reasoning": 1, "rows:weights": 2}
UNREAD = {"unread:speaker": 1, "unread:mood": 1, "unread-row:id": 2, "unread-row:source": 1}
COUNTS = {"tools:prompt": 2, "results:prompt": 2, "dropped-turns": 1} | ROW_COUNTS | UNREAD
MODES = {
    "all_turns": {"calls:trained": 2, "reasoning:trained": 2, "weights:trained": 1, "weights:untrained": 1},
    "last_turn": {
        "calls:prompt": 2,
        "reasoning:prompt": 1,
        "reasoning:trained": 1,
        "weights:trained": 1,
        "weights:untrained": 1,
    },
}
MODES["each_turn"] = MODES["all_turns"]


def make(config, train_on: str = "all_turns", chat_template: str = "chatml", **options) -> tuple:
    return dataclasses.replace(config, train_on=train_on), Template(
        tiny_tokenizer(), chat_template, train_on=train_on, **options
    )


@pytest.mark.parametrize("mode", MODES)
def test_what_becomes_of_each_field(jsonl, config, mode):
    """Two rows with fields and a plain one; a turn after the last response is not used."""
    config, template = make(config, mode)
    assert load_cache(jsonl(ROWS), template, config).counts == COUNTS | MODES[mode]


def test_plain_rows_have_nothing_to_report(jsonl, config, template):
    config.datasets = [jsonl(ROWS[2:])]
    data = load_data(config, template)
    assert data.train.caches[0].counts == {} and data.summary == []


def test_reasoning_that_is_masked(jsonl, config):
    config, template = make(config, train_on_reasoning=False)
    counts = load_cache(jsonl(ROWS), template, config).counts
    assert (counts["reasoning:untrained"], counts["calls:trained"]) == (2, 2) and "reasoning:trained" not in counts


def test_each_turn_trains_on_what_later_turns_no_longer_show(jsonl, config, tmp_path):
    """A template that strips earlier thoughts: as context they are not used, by themselves they are trained on."""
    (tmp_path / "t.jinja").write_text(LAST_THOUGHT)
    turns = [user("a"), answer("b", reasoning_content="why b"), user("c"), answer("d", reasoning_content="why d")]
    entry = jsonl([{"messages": turns, "documents": [{"text": "abc"}, {"text": "d"}]}])
    for mode, uses in (
        ("last_turn", {"reasoning:trained": 1, "reasoning:unused": 1}),
        ("each_turn", {"reasoning:trained": 2}),
    ):
        each, template = make(config, mode, str(tmp_path / "t.jinja"))
        documents = {"rows:documents": 1, "documents:prompt": 1, "documents:unused": 1}
        assert load_cache(entry, template, each).counts == documents | {"rows:reasoning": 1} | uses


def test_fields_that_the_template_loses(jsonl, config, tmp_path):
    """With on_missing=warn they count as not used, or as in the prompt if only the mask misses them."""
    (tmp_path / "t.jinja").write_text(LAST_THOUGHT)
    config, template = make(config, "last_turn", str(tmp_path / "t.jinja"), on_missing="warn")
    rows = [{"messages": ROWS[0]["messages"][:2], "tools": TOOLS}]
    counts = load_cache(jsonl(rows), template, config).counts
    assert (counts["calls:unused"], counts["tools:unused"], counts["reasoning:trained"]) == (2, 2, 1)


def test_preferences_count_their_prompt_once(jsonl, config, template):
    prompt = [user("q", speaker="ann"), answer("", tool_calls=[call("add", a=1)]), {"role": "tool", "content": "1"}]
    chosen = [answer("", tool_calls=[call("add", a=2), call("sub", a=3)], speaker="bob")]
    rejected = [answer("no", reasoning_content="let me see", speaker="eve")]
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "tools": TOOLS}
    counts = load_cache(jsonl([row]), template, config, "preference").counts
    assert counts == {
        **{f"rows:{name}": 1 for name in ("calls", "reasoning", "results", "tools")},
        "calls:prompt": 1,
        "calls:trained": 2,
        "results:prompt": 1,
        "reasoning:trained": 1,
        "tools:prompt": 2,
        "unread:speaker": 3,
    }


def test_what_is_not_rendered_is_not_read(jsonl, config, template):
    """A text has no template, and a template has no use for some arguments."""
    rows = [
        {"text": "abc", "tools": TOOLS},
        {"prompt": "a", "response": "b", "chat_template_kwargs": {"enable_thinking": True}},
    ]
    counts = load_cache(jsonl(rows), template, config).counts
    assert counts == {"unread-row:tools": 1, "unread-row:chat_template_kwargs.enable_thinking": 1}


def test_the_same_from_the_cache_and_with_several_processes(jsonl, config, template, monkeypatch):
    monkeypatch.setattr(cache_module, "SMALL_FILE_BYTES", 0)
    monkeypatch.setattr(cache_module, "CHUNK_ROWS", 2)
    entry = jsonl(ROWS * 5, n_examples=13)
    counts = [
        load_cache(entry, template, dataclasses.replace(config, num_proc=n, cache_dir=f"{config.cache_dir}-{n}")).counts
        for n in (1, 2, 2)
    ]
    assert counts[0] == counts[1] == counts[2]
    assert counts[0]["calls:trained"] == 2 * 5 and counts[0]["unread-row:source"] == 4  # row 14 is not used


def test_in_words(jsonl, config, template):
    config.datasets = [jsonl(ROWS), jsonl(ROWS[2:], "plain.jsonl")]
    counts = load_cache(config.datasets[0], template, config).counts
    fields = (
        "tools in 1 row: 2 in the prompt; tool calls in 1 row: 2 trained on; tool results in 1 row: 2 in the prompt; "
        "reasoning in 1 row: 2 trained on; weights in 2 rows: 1 trained on, 1 not trained on"
    )
    unread = (
        "keys of rows that are not used: id (2), source (1); keys of turns that are not used: speaker (1), mood (1)"
    )
    assert (describe_fields(counts), describe_unread(counts)) == (fields, unread)
    path = Path(config.datasets[0].path)
    assert load_data(config, template).summary[1:] == [f"{path}: {fields}", f"{path}: {unread}"]
