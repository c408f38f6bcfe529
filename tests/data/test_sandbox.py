"""Chat templates that do not end, or that fill the memory, and templates that may be what they are."""

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from minitrain.data.examples import Conversation, assistant, user
from minitrain.data.sandbox import UnboundedTemplate, render, render_marked
from minitrain.data.template import CHATML, PLAIN, Template
from minitrain.errors import ConfigError, DataError
from minitrain.model.tiny import tiny_tokenizer
from tests.data import test_template as templates
from tests.messages import raises

TALK = [user("what?"), assistant("that"), user("and?"), assistant("this")]
MANY = "{% for i in range(100000) %}"
END = "{% endfor %}"


def growing(step: str) -> str:
    """A template that makes something of itself sixty times."""
    return f"{{% set ns = namespace(x='a', y=[1], z=9) %}}{{% for i in range(60) %}}{step}{END}{{{{ ns.y }}}}"


@pytest.mark.parametrize(
    "source",
    [
        MANY * 3 + "x" + END * 3,
        MANY * 2 + "{% set x = i %}" + END * 2,
        MANY + "x" * 10_000 + END,
        MANY * 2 + "{{ loop.cycle('a', 'b') }}" + END * 2,
        MANY + "{% set x = range(100000)|map('string')|list %}" + END,
        "{% generation %}" + MANY * 2 + "x" + END * 2 + "{% endgeneration %}",
        "{{ 'a' * 10**10 }}",
        "{{ 10**10 * 'a' }}",
        "{{ ([0] * 10**10)|length }}",
        "{{ 9**9999999999 }}",
        growing("{% set ns.x = ns.x ~ ns.x %}"),
        growing("{% set ns.x = ns.x + ns.x %}"),
        growing("{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
        growing("{% set ns.y = ns.y + ns.y %}"),
        growing("{% set ns.y = [ns.y, ns.y] %}"),
        growing("{% set ns.z = ns.z * ns.z %}"),
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "{% for x in [1] recursive %}{{ loop([x]) }}{% endfor %}",
        "{% for x in range(99999) recursive %}{% if loop.depth < 5 %}{{ loop(range(99999)) }}{% endif %}{% endfor %}",
        "{{ 'a'|center(10000000000) }}",
        "{{ 'a'.ljust(10000000000) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' % (10000000000, 1) }}",
        "{{ '%10000000000d'|format(1) }}",
        "{{ '{:>10000000000}'.format(1) }}",
        "{{ '{a:>10000000000}'.format_map({'a': 1}) }}",
        "{% set x = 'a' * 1000000 %}{{ x.replace('a', x) }}",
        "{% set x = 'a' * 1000000 %}{{ x|replace('a', x) }}",
        "{% set x = 'a' * 1000000 %}{{ x.join(x) }}",
        "{{ range(100000)|join('a' * 1000000) }}",
        "{{ [1]|slice(10**10)|list }}",
        "{{ [1]|tojson(indent=10**10) }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% for i in [1] %}" * 30 + END * 30,
    ],
)
def test_templates_without_bounds(monkeypatch, source):
    """One error, from the template itself and from the tokenizer that has it; no hang and no more than some MB."""
    monkeypatch.setattr("minitrain.data.sandbox.MAX_SECONDS", 0.5)
    with pytest.raises(UnboundedTemplate):
        render(source, TALK, add_generation_prompt=False)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = source
    with raises(ConfigError, "invalid-template", "chat_template: "):
        Template(tokenizer)


def test_a_template_that_ends_for_some_conversations_only(monkeypatch):
    """The row is refused."""
    monkeypatch.setattr("minitrain.data.sandbox.MAX_SECONDS", 0.5)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if messages|length > 2 %}" + MANY * 2 + END * 2 + "{% endif %}" + PLAIN
    template = Template(tokenizer)
    template.encode(Conversation(TALK[:2]))
    with raises(DataError, "invalid-template"):
        template.encode(Conversation(TALK))


@pytest.mark.parametrize(
    "source, told",
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% include 'x' %}", "no loader"),
        ("{{ raise_exception('no') }}", "^no$"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
    ],
)
def test_errors_of_templates_stay_what_they_are(source, told):
    with pytest.raises(jinja2.TemplateError, match=told):
        render(source, TALK)


LONG = [one for i in range(300) for one in (user(f"question {i} " * 20), assistant(f"answer {i} " * 20))]
ACCUMULATING = (
    "{% set ns = namespace(text='') %}{% for m in messages %}{% set ns.text = ns.text ~ m.role + ': ' + m.content %}"
    "{% for other in messages[:loop.index0] %}{% if other.role == 'tool' %}x{% endif %}{% endfor %}{% endfor %}"
    "{{ ns.text|trim }}{{ messages|tojson }}{{ messages|map(attribute='role')|join(', ') }}{{ '%s-%d' % ('a', 3) }}"
)


@pytest.mark.parametrize(
    "source",
    [CHATML, PLAIN, templates.BARE_CHATML, templates.MISTRAL, templates.QWEN3, templates.ALPACA, ACCUMULATING],
)
@pytest.mark.parametrize("talk", [TALK, TALK[:1], LONG], ids=["talk", "question", "long"])
def test_what_is_rendered_is_what_transformers_renders(source, talk):
    """Also of 600 turns, and of a template that needs time and memory by the square of their number."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, variables = source, tokenizer.special_tokens_map
    for prompt in (False, True):
        whole = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)
        assert render(source, talk, add_generation_prompt=prompt, **variables) == whole


@pytest.mark.parametrize("source", [CHATML, PLAIN, templates.MARKED_WITHOUT_END, templates.MARKED_WITH_NEWLINE])
def test_the_spans_are_those_of_transformers(source):
    variables = tiny_tokenizer().special_tokens_map
    wanted, spans = render_jinja_template([TALK], chat_template=source, return_assistant_tokens_mask=True, **variables)
    assert render_marked(source, TALK, add_generation_prompt=False, **variables) == (wanted[0], spans[0])


ANSWER = "{% generation %}  {{ m.content }}!  {% endgeneration %}"
LATER = {
    "macro": "{% macro write(m) %}" + ANSWER + "{% endmacro %}{% for m in messages %}{{ write(m)|trim }};{% endfor %}",
    "set": "{% for m in messages %}{% set x %}" + ANSWER + "{% endset %}{{ x|length }}{{ x|trim }};{% endfor %}",
    "filter": "{% for m in messages %}{% filter trim %}" + ANSWER + "{% endfilter %};{% endfor %}",
    "call": "{% macro f() %}{{ caller()|trim }}{% endmacro %}"
    "{% for m in messages %}{% call f() %}" + ANSWER + "{% endcall %};{% endfor %}",
    "recursive loop": "{% for m in [messages[0]] recursive %}"
    "{% if loop.depth < 3 %}{{ loop([m])|trim }}{% endif %}" + ANSWER + "{% endfor %}",
}
SCOPED = (
    "{% set x = 'a' %}{% for m in messages %}"
    "{% generation %}{% set x = 'b' %}{{ x ~ loop.index }}{% endgeneration %}{{ x }}{% endfor %}"
)


@pytest.mark.parametrize("source", [*LATER.values(), SCOPED], ids=[*LATER, "scope"])
def test_marks_of_spans_do_not_change_the_text(source):
    """Also where the template takes white space or characters from the text of a span; such spans are left out."""
    wanted, _ = render_jinja_template([TALK], chat_template=source)
    assert render(source, TALK) == wanted[0]
    assert render_marked(source, TALK) == (wanted[0], [(i, i + 2) for i in (0, 3, 6, 9)] if source is SCOPED else [])


def test_a_key_with_the_name_of_a_method_does_not_hide_the_method():
    talk = [user("a") | {"items": "x", "name": "b"}]
    source = "{% for key, _ in messages[0].items() %}{{ key }}{% endfor %}{{ messages[0].name }}{{ messages[0].no }}"
    wanted, _ = render_jinja_template([talk], chat_template=source)
    assert render(source, talk) == wanted[0] == "rolecontentitemsnameb"
