"""The chat templates that the package trl has: every field of a row is trained on after the prompt of inference, or
the row is refused."""

import json
import runpy

import pytest

from minitrain.data.messages import number_calls
from tests.chat_templates import CASES, MODES, Outcome, trl_templates, trl_version, try_case
from tests.conftest import ROOT

TEMPLATES = trl_templates()
needs_trl = pytest.mark.skipif(not TEMPLATES, reason="trl is not installed, whose templates are read")


def is_in(value: str, text: str) -> bool:
    return any(form in text for form in (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]))


def fields(message: dict) -> list[str]:
    """The texts of a response that must be trained on."""
    functions = [call["function"] for call in message.get("tool_calls", ())]
    arguments = [value for function in functions for value in function["arguments"].values()]
    names = [function["name"] for function in functions]
    return [message["content"], message.get("reasoning_content", ""), *names, *arguments]


def check(outcome: Outcome, train_on: str) -> None:
    template, example, documents, _ = outcome
    tokenizer, messages = template.tokenizer, number_calls(example.messages)
    targets = [
        tokenizer.decode([token for token, flag in zip(document.ids, document.mask) if flag]) for document in documents
    ]
    answers = [message for message in messages if message["role"] == "assistant"]
    for message in answers[-1:] if train_on == "last_turn" else answers:
        assert [value for value in fields(message) if not any(is_in(value, text) for text in targets)] == []
    options = {key: value for key, value in example.variables.items() if key != "tools"}
    for document in documents:
        history = template.renderer.adapt(messages[: document.turns[0]])
        if template.renderer.call_form.empty_content is None and any("tool_calls" in turn for turn in history):
            continue  # transformers leaves out what is None, which this template asks for
        prompt = tokenizer.apply_chat_template(
            history, tools=example.variables.get("tools"), add_generation_prompt=True, tokenize=False, **options
        )
        begins = document.ids[: document.mask.index(True)]
        is_same = begins == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert is_same or (train_on == "all_turns" and document.counts["other-prompts"]), tokenizer.decode(begins)


@needs_trl
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_field_is_trained_on_after_the_prompt_of_inference(name):
    """In each case and mode: all of a row is in the targets, and the tokens before them are those that
    apply_chat_template gives at inference; or the row is refused."""
    for case in CASES:
        for train_on in MODES:
            outcome = try_case(name, TEMPLATES[name], case, train_on)
            if outcome.error:
                assert outcome.error.code in ("lost-field", "other-prompt", "invalid-template"), (case, train_on)
            else:
                check(outcome, train_on)


@needs_trl
def test_the_table_of_the_documents():
    """docs/data.md has what becomes of each case with each template."""
    script = runpy.run_path(str(ROOT / "docs" / "generate_templates.py"))
    page = (ROOT / "docs" / "data.md").read_text()
    if trl_version() not in page:
        pytest.skip(f"the table is of another version than trl {trl_version()}")
    assert script["document"]() == page, "run: python docs/generate_templates.py"
