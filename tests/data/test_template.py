"""Conversations -> ids and mask: what is learned, to the token, for templates of every kind."""

import jinja2
import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from minitrain.config.sections import ModelConfig
from minitrain.data.examples import Conversation, PlainText
from minitrain.data.rendering import ChatRenderer
from minitrain.data.template import Template, Tokens
from minitrain.errors import ConfigError, DataError
from minitrain.model.load import load_tokenizer
from minitrain.model.tiny import tiny_tokenizer
from tests.messages import raises

# Written the way model makers write them: without generation markers.
BARE_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED_WITHOUT_END = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED_WITH_NEWLINE = MARKED_WITHOUT_END.replace(
    "{{ message['content'] }}{% endgeneration", "{{ message['content'] + '<|im_end|>\\n' }}{% endgeneration"
).replace(
    "{{ '<|im_end|>\\n' }}{% endfor", "{% if message['role'] != 'assistant' %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor"
)
# The template may change what a macro writes, so its markers are not used.
MARKED_IN_MACRO = (
    "{% macro write(m) %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endmacro %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + write(m) + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Mistral has it: the system prompt stands before the last turn of the user, and moves on with it.
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set sys = messages[0]['content'] + '\\n\\n' %}"
    "{% set msgs = messages[1:] %}{% else %}{% set sys = '' %}{% set msgs = messages %}{% endif %}"
    "{% for message in msgs %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST]' + (sys if loop.last else '') + message['content'] + '[/INST]' }}{% else %}"
    "{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
# As Qwen3 has it: thoughts of earlier turns are dropped, and an empty thought is put before an answer without one.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% set answer = m['content'].split('</think>')[-1].lstrip('\\n') %}"
    "{% set thought = m['content'].split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in m['content']"
    " else '' %}{% if loop.index0 > ns.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ answer }}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)
# As Alpaca has it: no special token ends a turn.
ALPACA = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '### Response:\\n' + message['content'] }}"
    "{% else %}{{ '### Instruction:\\n' + message['content'] }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
END = "<|im_end|>"


def made(chat_template: str, train_on: str = "all_turns", **changes) -> Template:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return Template(tokenizer, "auto", train_on)


def talk(*contents: str, first: str = "user") -> list[dict[str, str]]:
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def system(content: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": content}]


def learned(template: Template, tokens: Tokens) -> list[str]:
    """The learned stretches, decoded."""
    texts, stretch = [], []
    for token, flag in zip([*tokens.ids, None], [*tokens.mask, False]):
        if flag:
            stretch.append(token)
        elif stretch:
            texts.append(template.tokenizer.decode(stretch))
            stretch = []
    return texts


def encode(template: Template, messages: list[dict[str, str]]) -> Tokens:
    return template.encode(Conversation(messages))


TEMPLATES = {
    "bare": BARE_CHATML,
    "marked without end": MARKED_WITHOUT_END,
    "marked with newline": MARKED_WITH_NEWLINE,
    "marked in a macro": MARKED_IN_MACRO,
    "mistral": MISTRAL,
    "qwen3": QWEN3,
}
ANSWERS = ["plain", " a space", "two\n\nlines", "\U0001f600 smile", "ends in a line\n", "{{name}} {% x %}"]


@pytest.mark.parametrize("answer", [*ANSWERS, "\nnewline first"])
@pytest.mark.parametrize("name", [*TEMPLATES, "chatml"])
def test_mask_is_the_answers(name, answer):
    """What is learned is the assistant's words and the token that ends the turn, whether or not the template has
    generation markers (trl#4201); answers that begin with a space, a line break or an emoji lose nothing
    (VeOmni#873)."""
    template = made(TEMPLATES[name]) if name != "chatml" else Template(tiny_tokenizer())
    if name == "qwen3":
        answer = answer.lstrip("\n")  # so does the template
    tokens = encode(template, talk("first?", answer, "second?", answer))
    assert learned(template, tokens) == [answer + END] * 2
    assert tokens.counts == (
        {"other-prompts": 1} if name == "qwen3" else {}
    )  # the first answer, without an empty thought
    assert tokens.mask[-1] and template.tokenizer.decode(tokens.ids[-1]) == END


@pytest.mark.parametrize("answer", ["plain", "\nnewline first"])
def test_plain_text_around_the_answer(answer):
    """chat_template none: the texts as they are, each answer ended by EOS."""
    template = Template(tiny_tokenizer(), "none")
    tokens = encode(template, talk("1 + 1 = ", answer, "more: ", "3"))
    assert template.tokenizer.decode(tokens.ids) == f"1 + 1 = {answer}{END}more: 3{END}"
    assert learned(template, tokens) == [answer + END, "3" + END]


def test_template_without_an_end_token():
    """Where the template ends an answer with no special token, EOS is appended and learned (trl#1623)."""
    template = made(ALPACA)
    tokens = encode(template, talk("ask", "tell", "again", "told"))
    assert template.tokenizer.decode(tokens.ids).endswith("### Response:\ntold" + END)
    assert learned(template, tokens) == ["tell", "told" + END]


@pytest.mark.parametrize("written", ["{{ bos_token }}", ""])
def test_one_bos(written):
    """A tokenizer that begins every text with BOS, a template that writes it or not: one (transformers#31796)."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    begins = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begins
    tokenizer.chat_template = written + BARE_CHATML
    template = Template(tokenizer)
    for ids in (encode(template, talk("ask", "tell")).ids, template.encode_prompt(talk("ask"))):
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    options = {"add_generation_prompt": True, "return_dict": True}  # what is saved: servers add no BOS to its text
    assert tokenizer.apply_chat_template(talk("ask"), **options)["input_ids"] == template.encode_prompt(talk("ask"))
    saved = tokenizer.chat_template
    again = Template(tokenizer)
    assert tokenizer.chat_template == saved and again.encode_prompt(talk("ask")) == template.encode_prompt(talk("ask"))


def test_end_is_learned_when_pad_is_eos():
    """pad == eos: the answer's end token is still a label (trl#6357)."""
    template = made(BARE_CHATML, pad_token=END)
    assert template.tokenizer.pad_token_id == template.tokenizer.eos_token_id
    tokens = encode(template, talk("ask", "tell"))
    assert tokens.ids[-1] == template.tokenizer.pad_token_id and tokens.mask[-1]


@pytest.mark.parametrize("train_on", ["all_turns", "last_turn"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_train_on(name, train_on):
    """last_turn learns the last answer only; the ids are the same either way."""
    conversation = [*system("be brief"), *talk("q1", "a1", "q2", "a2", "q3", "a3")]
    tokens = encode(made(TEMPLATES[name], train_on), conversation)
    template = made(TEMPLATES[name])
    assert tokens.ids == encode(template, conversation).ids
    expected = ["a1", "a2", "a3"] if train_on == "all_turns" else ["a3"]
    assert learned(template, tokens) == [answer + END for answer in expected]


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_of_inference_is_the_prefix(name):
    """The prompt's ids at inference are those that stood before the answer in training, at every turn, and are the
    ids that transformers gives the rendered prompt."""
    template = made(TEMPLATES[name])
    conversation = [*system("be brief"), *talk("q1", " a1", "q2", "\U0001f600a2", "q3", "a3")]
    for n in (2, 4, 6):
        prompt = template.encode_prompt(conversation[:n])
        tokens = encode(template, conversation[: n + 1])
        assert tokens.ids[: len(prompt)] == prompt
        assert tokens.mask[len(prompt)] and not tokens.mask[len(prompt) - 1]
        whole = template.tokenizer.apply_chat_template(conversation[:n], tokenize=False, add_generation_prompt=True)
        assert prompt == template.tokenizer(whole, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["bare", "marked without end", "qwen3"])
def test_tool_turns(name):
    """Calls of tools are learned, their results are not."""
    messages = [
        *talk("weather?", '{"call": "weather"}'),
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ]
    template = made(TEMPLATES[name])
    tokens = encode(template, messages)
    assert learned(template, tokens)[-1] == "It rains." + END
    assert "rain<" not in "".join(learned(template, tokens)) and "rain" in template.tokenizer.decode(tokens.ids)
    if name != "qwen3":
        assert learned(template, tokens)[0] == '{"call": "weather"}' + END


@pytest.mark.parametrize("name", ["bare", "marked without end"])
def test_conversation_that_the_assistant_begins(name):
    """A first turn of the assistant is learned; one token before it there always is."""
    template = made(TEMPLATES[name])
    assert learned(template, encode(template, talk("hello", "hi", "bye", first="assistant"))) == [
        "hello" + END,
        "bye" + END,
    ]
    assert learned(template, encode(template, talk("hello", first="assistant"))) == ["hello" + END]


def test_first_token_is_never_learned():
    """The first token of a document has nothing before it to be predicted from."""
    template = Template(tiny_tokenizer(), "none")
    for record in (PlainText("abc"), Conversation(talk("abc", first="assistant")), Conversation(talk("", "abc"))):
        tokens = template.encode(record)
        assert tokens.mask == [False, True, True, True]


def test_trailing_turn_of_the_user():
    """What stands behind the last answer teaches nothing and is left out."""
    template = made(BARE_CHATML)
    tokens, expected = encode(template, talk("q1", "a1", "q2")), encode(template, talk("q1", "a1"))
    assert (tokens.ids, tokens.mask, tokens.counts) == (expected.ids, expected.mask, {"dropped-turns": 1})


def test_history_that_the_template_rewrites():
    """A system prompt that moves to the last turn of the user: trained on as it is at inference, and counted nowhere
    twice."""
    template = made(MISTRAL)
    tokens = encode(template, [*system("SYS"), *talk("q1", "a1", "q2", "a2")])
    assert template.tokenizer.decode(tokens.ids) == f"[INST]q1[/INST]a1{END}[INST]SYS\n\nq2[/INST]a2{END}"


def test_thoughts_that_the_template_drops():
    """Thoughts of earlier turns are dropped from the text, which is refused, or counted with on_missing=warn."""
    template = made(QWEN3)
    thought = "<think>\nhmm\n</think>\n\n"
    messages = talk("q1", thought + "a1", "q2", thought + "a2")
    with raises(DataError, "lost-field", "turn 2 of 4", "each_turn"):
        encode(template, messages)
    template.needles = template.needles._replace(on_missing="warn")
    tokens = encode(template, messages)
    text = template.tokenizer.decode(tokens.ids)
    assert text.count("hmm") == 1 and f"assistant\na1{END}" in text
    assert learned(template, tokens)[-1] == "hmm\n</think>\n\na2" + END
    assert tokens.counts == {"lost:content": 1, "lost:reasoning": 1, "other-prompts": 1}
    assert len(learned(template, tokens)) == 1


def test_marks_that_cover_nothing():
    """A template whose generation markers cover nothing in a conversation is an error of that row."""
    template = made("{{ messages[0]['content'] }}{% if false %}{% generation %}{% endgeneration %}{% endif %}")
    with raises(DataError, "invalid-template"):
        encode(template, talk("q", "a"))


def test_template_that_hides_the_answer():
    """A template that writes the answer nowhere is an error of that row."""
    template = made(BARE_CHATML)
    template.renderer = ChatRenderer("{{ messages|length }}{{ 'x' if add_generation_prompt else 'y' }}", {})
    with raises(DataError, "invalid-template", "chat_template=chatml"):
        encode(template, talk("q", "a"))


def test_template_that_refuses():
    """What the template refuses is an error of that row, with the template's words, in training and at inference."""
    template = made(MISTRAL)
    for attempt in (lambda m: encode(template, m), template.encode_prompt):
        with raises(DataError, "invalid-template", "Conversation roles must alternate"):
            attempt(talk("hello", "hi", "again", first="assistant"))


def test_template_runs_in_the_sandbox():
    """A hostile template cannot reach Python's insides (template injection)."""
    hostile = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises((DataError, jinja2.exceptions.SecurityError)):
        encode(made(BARE_CHATML + hostile), talk("q", "a"))


@pytest.mark.parametrize("text", ["half \ud83d", "mark \ue0f0", "mark \ue0f1"])
def test_texts_that_cannot_be_used(text):
    """Half a surrogate pair cannot be tokenised, and the marks of this library may not stand in a text."""
    template = made(BARE_CHATML)
    for attempt in (
        lambda: encode(template, talk(text, "a")),
        lambda: template.encode(PlainText(text)),
        lambda: template.encode_prompt(talk(text)),
    ):
        with raises(DataError, "invalid-text"):
            attempt()


def test_plain_text():
    """A text is learned whole but for its first token, and ends in one EOS, whether or not it is written out."""
    template = Template(tiny_tokenizer())
    for text in ("abc", "abc" + END):
        tokens = template.encode(PlainText(text))
        assert template.tokenizer.decode(tokens.ids) == "abc" + END
        assert tokens.mask == [False, True, True, True]


def test_template_from_a_file(tmp_path):
    """chat_template takes a .jinja file."""
    path = tmp_path / "t.jinja"
    path.write_text(ALPACA, encoding="utf-8")
    template = Template(tiny_tokenizer(), str(path))
    assert template.tokenizer.decode(template.encode_prompt(talk("q"))) == "### Instruction:\nq\n\n### Response:\n"


def test_several_templates():
    """A tokenizer with several named templates does not have one picked for it."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": BARE_CHATML, "tools": BARE_CHATML}
    with raises(ConfigError, "invalid-template", "chat_template: ", ".jinja"):
        Template(tokenizer)


def test_tokens_that_end_an_answer():
    """Generation stops at EOS and at the token that closes a turn of this template."""
    assert made(BARE_CHATML).end_ids() == [made(BARE_CHATML).tokenizer.convert_tokens_to_ids(END)]
    template = made(BARE_CHATML, eos_token="<|pad|>")
    assert template.tokenizer.convert_ids_to_tokens(template.end_ids()) == ["<|pad|>", END]


def test_settings_left_by_other_calls():
    """Padding or truncation that another call left switched on in the tokenizer does not reach the ids."""
    template = made(BARE_CHATML)
    before = encode(template, talk("question", "answer"))
    template.tokenizer(["a"], padding="max_length", truncation=True, max_length=4)
    assert encode(template, talk("question", "answer")) == before


def test_special_token_that_swallows_spaces():
    """A special token that takes the white space behind it takes it in the pieces too, as it does at inference."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|assistant|>", rstrip=True)]})
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>' + m['content'] + '<|im_end|>' }}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    template = Template(tokenizer)
    tokens = encode(template, talk("q", "  a", "q", "  b"))
    whole = tokenizer.apply_chat_template(talk("q", "  a", "q", "  b"), tokenize=False)
    assert tokens.ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert learned(template, tokens) == ["a" + END, "b" + END]


def test_a_template_that_is_not_jinja_is_refused_by_name(tmp_path):
    """The error names the option and the line of the template, not a row of the data."""
    file = tmp_path / "broken.jinja"
    file.write_text("{% for message in messages %}{{ message }")
    with raises(ConfigError, "invalid-template", "chat_template: ", "line 1"):
        Template(tiny_tokenizer(), str(file))


def test_chatml_keeps_the_special_tokens_of_the_base(byte_folder):
    """Its two tokens come to those that the tokenizer lists, and do not replace them."""
    tokenizer = load_tokenizer(ModelConfig("", byte_folder))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool|>", "<|call|>"]})
    Template(tokenizer)
    assert set(tokenizer.all_special_tokens) == {"<|end|>", "<|tool|>", "<|call|>", "<|im_start|>", "<|im_end|>"}
