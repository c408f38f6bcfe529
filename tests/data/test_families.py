"""What is trained on with templates that behave as those of well-known models, to the character."""

import pytest

from minitrain.config.sections import DatasetConfig
from minitrain.data.encode import TruncationConfig, encode
from minitrain.data.examples import to_example
from minitrain.data.template import Template
from minitrain.errors import DataError
from minitrain.model.tiny import tiny_tokenizer
from tests import small_templates as small
from tests.chat_templates import TOOLS, call, turn
from tests.messages import raises

END = "<|im_end|>"


def make_template(source: str, **options) -> Template:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": small.SPECIAL}, replace_extra_special_tokens=False)
    tokenizer.chat_template = source
    return Template(tokenizer, **options)


def documents(source: str, *turns: dict, tools: list | None = None, **options) -> list[tuple[str, dict]]:
    """Return the text of each document, with its targets in brackets, and its counts."""
    template = make_template(source, **options)
    example = to_example({"messages": list(turns), "tools": tools}, DatasetConfig(path="x.jsonl"))
    texts = []
    for document in encode(example, template, TruncationConfig(4096)):
        text, before, piece = "", False, []
        for token, is_target in [*zip(document.ids, document.mask), (None, None)]:
            if is_target != before:
                text += template.tokenizer.decode(piece) + ("⟦" if is_target else "⟧" if before else "")
                before, piece = is_target, []
            piece.append(token)
        texts.append((text, document.counts))
    return texts


def user(content: str) -> dict:
    return turn("user", content)


def answer(content: str, **keys) -> dict:
    return turn("assistant", content, **keys)


ROME, OSLO = call("get_weather", city="Rome"), call("get_time", city="Oslo")
TWO_ROUNDS = (user("q1"), answer("a1", reasoning_content="t1"), user("q2"), answer("a2", reasoning_content="t2"))
CALL_ROUND = (user("q"), answer("", reasoning_content="t1", tool_calls=[ROME]), turn("tool", "r"), answer("a"))


def test_r1_continues_the_thought_that_the_prompt_opens():
    """The reasoning, which the template itself strips, follows the opener; each response has its own document."""
    second, first = documents(small.R1, *TWO_ROUNDS, train_on="each_turn")
    assert first[0] == f"<|im_start|>q1<|pad|><think>\n⟦t1\n</think>\n\na1{END}⟧"
    assert second[0] == f"<|im_start|>q1<|pad|>a1{END}<|im_start|>q2<|pad|><think>\n⟦t2\n</think>\n\na2{END}⟧"
    with raises(DataError, "lost-field", "turn 2 of 4", "each_turn"):
        documents(small.R1, *TWO_ROUNDS)


@pytest.mark.parametrize("keys", [{}, {"tool_calls": [ROME]}])
def test_r1_refuses_a_response_without_reasoning(keys):
    """Its prompt opens a thought, so the response would be an empty one; with on_missing=warn it is, and is counted."""
    turns = (user("q"), answer("" if keys else "a", **keys))
    with raises(DataError, "other-prompt", "turn 2 of 2"):
        documents(small.R1, *turns)
    ((text, counts),) = documents(small.R1, *turns, on_missing="warn")
    assert "<think>\n⟦\n</think>\n\n" in text and counts == {"empty-thoughts": 1}


def test_r1_with_a_thought_that_is_empty_on_purpose():
    ((text, counts),) = documents(small.R1, user("q"), answer("<think></think>a"))
    assert text.endswith(f"<think>\n⟦\n</think>\n\na{END}⟧") and counts == {}


def test_r1_calls():
    """Calls need a content of null and arguments as JSON."""
    ((text, _),) = documents(small.R1, user("q"), answer("", reasoning_content="t", tool_calls=[ROME, OSLO]))
    calls = '<call>get_weather {"city": "Rome"}</call><call>get_time {"city": "Oslo"}</call>'
    assert text.endswith(f"<think>\n⟦t\n</think>\n\n{calls}{END}⟧")


def test_gpt_oss_channels():
    """Reasoning is analysis under the key thinking; a call ends in its own token, which ends generation, too."""
    ((text, counts),) = documents(small.GPT_OSS, *CALL_ROUND[:2], tools=None)
    assert text.endswith(
        "<|im_start|>assistant⟦<|channel|>analysis<|message|>t1<|end|><|im_start|>assistant to=get_weather"
        '<|channel|>commentary<|message|>{"city": "Rome"}<|call|>⟧'
    )
    assert counts == {}
    template = make_template(small.GPT_OSS)
    assert {"<|call|>", "<|return|>"} <= set(template.tokenizer.convert_ids_to_tokens(template.end_ids()))


def test_gpt_oss_drops_analysis_once_it_has_answered():
    """So a later round needs each_turn. Before the answer, the prompt still has the analysis of the call."""
    ((text, counts),) = documents(small.GPT_OSS, *CALL_ROUND)
    assert "⟦<|channel|>analysis<|message|>t1<|end|>" in text and counts == {}
    assert text.endswith("assistant⟦<|channel|>final<|message|>a<|return|>⟧")
    with raises(DataError, "lost-field", "turn 2 of 4", "reasoning"):
        documents(small.GPT_OSS, *TWO_ROUNDS)
    second, first = documents(small.GPT_OSS, *TWO_ROUNDS, train_on="each_turn")
    assert "t1" not in second[0] and "⟦<|channel|>analysis<|message|>t1<|end|>" in first[0]


def test_gpt_oss_earlier_answers():
    """They have another end than the last one; the channel is of the response, because the prompt does not have it."""
    ((text, counts),) = documents(small.GPT_OSS, user("q1"), answer("a1"), user("q2"), answer("a2"))
    assert "assistant⟦<|channel|>final<|message|>a1<|end|>⟧<|im_start|>user" in text and counts == {}


def test_gpt_oss_has_one_call_in_a_turn():
    with raises(DataError, "lost-field", "get_time"):
        documents(small.GPT_OSS, user("q"), answer("", tool_calls=[ROME, OSLO]))


@pytest.mark.parametrize("call_id", [None, "abcdefghi", "call_0123456789abcdef"])
def test_mistral_ids(call_id):
    """They have 9 characters, which longer ones are made into; a result has the id of its call."""
    calls = [ROME | ({"id": call_id} if call_id else {})]
    result = turn("tool", "r", **({"tool_call_id": call_id} if call_id else {}))
    ((text, _),) = documents(small.MISTRAL, user("q"), answer("", tool_calls=calls), result, answer("a"), tools=TOOLS)
    assert '⟦[CALLS][{"name": "get_weather", "arguments": {"city": "Rome"}}]' + END + "⟧[RESULT]r" in text
    written = text.partition("[RESULT]r")[2].partition("[/RESULT]")[0]
    assert len(written) == 9 and (written == call_id or call_id != "abcdefghi")
    assert text.startswith("[TOOLS][") and text.endswith(f"⟦a{END}⟧")


def test_mistral_parallel_calls():
    turns = (user("q"), answer("", tool_calls=[ROME, OSLO]), turn("tool", "r1"), turn("tool", "r2"), answer("a"))
    ((text, _),) = documents(small.MISTRAL, *turns)
    calls = (
        '{"name": "get_weather", "arguments": {"city": "Rome"}}, {"name": "get_time", "arguments": {"city": "Oslo"}}'
    )
    assert f"⟦[CALLS][{calls}]{END}⟧[RESULT]r1call00001[/RESULT][RESULT]r2call00002[/RESULT]⟦a{END}⟧" in text


def test_llama_31():
    """Tools are in the turn of the user; a call beside a text or another call is refused."""
    turns = (user("q"), answer("", tool_calls=[ROME]), turn("tool", "r"), answer("a"))
    ((text, counts),) = documents(small.LLAMA31, *turns, tools=TOOLS)
    assert text.index("get_time") < text.index("q<|im_end|>") and counts == {}
    assert '⟦{"name": "get_weather", "parameters": {"city": "Rome"}}<|im_end|>⟧' in text
    with raises(DataError, "lost-field", "content"):
        documents(small.LLAMA31, user("q"), answer("look", tool_calls=[ROME]))
    with raises(DataError, "invalid-template", "one call at once"):
        documents(small.LLAMA31, user("q"), answer("", tool_calls=[ROME, OSLO]))


def test_qwen3_strips_thoughts_of_earlier_rounds():
    with raises(DataError, "lost-field", "turn 2 of 4", "reasoning"):
        documents(small.QWEN3, *TWO_ROUNDS)
    second, first = documents(small.QWEN3, *TWO_ROUNDS, train_on="each_turn")
    assert first[0].endswith(f"assistant\n⟦<think>\nt1\n</think>\n\na1{END}⟧")
    assert f"assistant\na1{END}\n" in second[0] and second[0].endswith(f"⟦<think>\nt2\n</think>\n\na2{END}⟧")


def test_qwen3_empty_thoughts():
    """An empty thought is trained on and counted; enable_thinking=false moves it into the prompt."""
    ((text, counts),) = documents(small.QWEN3, user("q"), answer("a"))
    assert text.endswith(f"assistant\n⟦<think>\n\n</think>\n\na{END}⟧") and counts == {"empty-thoughts": 1}
    ((text, counts),) = documents(small.QWEN3, user("q"), answer("a"), variables={"enable_thinking": False})
    assert text.endswith(f"assistant\n<think>\n\n</think>\n\n⟦a{END}⟧") and counts == {}


def test_qwen3_refuses_reasoning_after_a_prompt_without():
    """The prompt of enable_thinking=false excludes a thought: that is refused, or counted with on_missing=warn."""
    turns = (user("q"), answer("a", reasoning_content="t"))
    with raises(DataError, "other-prompt", "turn 2 of 2", "enable_thinking: true"):
        documents(small.QWEN3, *turns, variables={"enable_thinking": False})
    ((text, counts),) = documents(small.QWEN3, *turns, variables={"enable_thinking": False}, on_missing="warn")
    assert text.endswith(f"<think>\n⟦t\n</think>\n\na{END}⟧") and counts == {"other-prompts": 1}


def test_earlier_responses_after_another_prompt_are_counted():
    """The first response of a conversation has no empty thought before it, as its prompt at inference has."""
    turns, options = (user("q1"), answer("a1"), user("q2"), answer("a2")), {"variables": {"enable_thinking": False}}
    ((text, counts),) = documents(small.QWEN3, *turns, **options)
    assert f"assistant\n⟦a1{END}⟧" in text and counts == {"other-prompts": 1}
    assert [counts for _, counts in documents(small.QWEN3, *turns, train_on="each_turn", **options)] == [{}, {}]


def test_phi3_appends_eos():
    """What follows the token that ends the last turn is not of the response: it has one end, as every turn."""
    turns = (user("q1"), answer("a1"), user("q2"), answer("a2"))
    ((text, _),) = documents(small.PHI3, *turns)
    assert text == "<|user|>\nq1<|end|>\n<|assistant|>\n⟦a1<|end|>⟧\n<|user|>\nq2<|end|>\n<|assistant|>\n⟦a2<|end|>⟧"
    assert documents(small.PHI3, *turns, train_on="each_turn") == documents(small.PHI3, *turns)


def test_contents_as_parts():
    ((text, _),) = documents(small.PARTS, turn("system", "s"), user("q"), answer("a"))
    assert text == f"system: s{END}\nuser: q{END}\nassistant: ⟦a{END}⟧"


def test_glm4_ends_a_turn_with_the_next_one():
    """Also one with a call; after the last one comes EOS."""
    turns = (user("q"), answer("", tool_calls=[ROME]), turn("tool", "r"), answer("a"))
    ((text, _),) = documents(small.GLM4, *turns)
    calls = '<call>{"name": "get_weather", "arguments": {"city": "Rome"}}</call>'
    assert text == f"<|user|>\nq<|assistant|>\n⟦{calls}<|tool|>⟧\nr<|assistant|>\n⟦a{END}⟧"


MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{{ 'BEFORE' }}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\nPROMPT' }}{% endif %}"
)


def test_marks_that_begin_after_the_prompt():
    """What inference has to write before the marks is trained on, too, in the last response."""
    ((text, counts),) = documents(MARKED.replace("PROMPT", ""), user("q"), answer("a"))
    assert text.endswith(f"assistant\n⟦BEFOREa{END}⟧") and counts == {}


def test_marks_of_a_template_whose_prompt_opens_a_thought():
    """The response follows the prompt of inference, which the marked text does not have (R1)."""
    turns = (user("q"), answer("a", reasoning_content="t"))
    ((text, _),) = documents(MARKED.replace("BEFORE", "").replace("PROMPT", "<think>\\n"), *turns)
    assert text.endswith(f"assistant\n<think>\n⟦t\n</think>\n\na{END}⟧")


def test_marks_of_earlier_responses_after_another_prompt():
    """They are counted: only the last response has what the prompt opens."""
    source = MARKED.replace("{{ 'BEFORE' }}", "{{ 'OPEN' if loop.last }}").replace("PROMPT", "OPEN")
    ((text, counts),) = documents(source, user("q1"), answer("a1"), user("q2"), answer("a2"))
    assert text.endswith(f"assistant\nOPEN⟦a2{END}⟧") and counts == {"other-prompts": 1}
