"""chat_template_kwargs: the template of the saved model has them as its defaults, and a row overrides them."""

import json

import pytest
from transformers import AutoTokenizer

from minitrain.config.sections import DatasetConfig
from minitrain.data.cache import Encoder
from minitrain.data.encode import TruncationConfig
from minitrain.data.examples import to_example
from minitrain.data.template import Template
from minitrain.errors import ConfigError
from minitrain.inference.generate import load_generator
from minitrain.model.tiny import tiny_tokenizer
from tests.messages import raises

# As Qwen3: the prompt has an empty thought if thinking is off. The macro and the loop have scopes of their own.
THINKER = """
  {%- macro opened() %}{{ '' if enable_thinking else '<think>\\n\\n</think>\\n\\n' }}{% endmacro %}
  {%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
  {%- endfor %}
  {%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' + opened() }}{% endif %}"""
QUESTION = [{"role": "user", "content": "q"}]
OPEN, CLOSED = "<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"


def thinker(**variables):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = THINKER
    return Template(tokenizer, variables=variables)


def prompt(template, **variables):
    return template.tokenizer.decode(template.encode_prompt(QUESTION, variables))


@pytest.mark.parametrize("thinking, end", [(True, OPEN), (False, CLOSED)])
def test_a_saved_template_has_the_defaults_of_training(tmp_path, thinking, end):
    """The prompt is the one of transformers with the argument, also for who loads the tokenizer and passes nothing."""
    plain, template = thinker().tokenizer, thinker(enable_thinking=thinking)
    expected = plain.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False, enable_thinking=thinking)
    assert prompt(template) == expected and expected.endswith(end)
    template.tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False) == expected
    assert prompt(Template(saved)) == expected


def test_a_row_overrides_a_default():
    """Also a default that a saved template has, also with another one."""
    template = thinker(enable_thinking=False)
    assert prompt(template, enable_thinking=True).endswith("\n" + OPEN)
    again = Template(template.tokenizer, variables={"enable_thinking": True})
    assert prompt(again).endswith("\n" + OPEN) and prompt(again, enable_thinking=False).endswith(CLOSED)


def test_defaults_are_added_once():
    """A tokenizer that is given in Python keeps the same template in each run."""
    tokenizer = thinker(enable_thinking=False).tokenizer
    before = tokenizer.chat_template
    assert Template(tokenizer, variables={"enable_thinking": False}).tokenizer.chat_template == before != THINKER


def test_values_of_every_type():
    """Jinja reads them as Python has them."""
    values = {"a": [1, -2.5, None, True], "b": {"c": "'\"\\{{ %}\n"}}
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ [a, b] | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
    text = Template(tokenizer, variables=values).renderer.bind({}).text(QUESTION)
    assert json.loads(text.removesuffix("q")) == list(values.values())


@pytest.mark.parametrize(
    "variables, code",
    [
        ({"enable_thinkng": False}, "no-effect"),
        ({"tools": []}, "unknown-option"),
        ({"enable_thinking": float("nan")}, "wrong-type"),
    ],
)
def test_arguments_that_are_refused(variables, code, wording):
    """What the template does not read, what has an option of its own, and what is no value."""
    with raises(ConfigError, code, f"chat_template_kwargs.{next(iter(variables))}: ") as refused:
        thinker(**variables)
    wording(str(refused.value))


def test_arguments_of_rows_that_are_not_read():
    """They are counted as keys that are not used."""
    row = {
        "prompt": "a",
        "response": "b",
        "chat_template_kwargs": {"enable_thinking": True, "x": 1},
        "documents": ["a text"],
    }
    dataset, template = DatasetConfig("rows.jsonl"), thinker()
    assert to_example(row, dataset).variables.keys() == {"enable_thinking", "x", "documents"}
    chunk = Encoder(dataset, template, TruncationConfig(100), "conversation")([(1, row)])
    assert chunk.counts[0][1] == {"unread-row:chat_template_kwargs.x": 1, "rows:documents": 1, "documents:unused": 1}


def test_a_trained_model_remembers(make_trainer, tmp_path):
    """`final/` gives the prompts of training, its card has the option, and training from it continues with them."""
    (tmp_path / "t.jinja").write_text(THINKER)
    trainer = make_trainer(
        f"chat_template={tmp_path}/t.jinja", "chat_template_kwargs.enable_thinking=true", "n_steps=1"
    )
    trainer.train()
    final = trainer.run.final
    generator = load_generator(final)
    assert generator.encode(QUESTION) == trainer.generator.encode(QUESTION) == trainer.template.encode_prompt(QUESTION)
    assert generator.tokenizer.decode(generator.encode(QUESTION)).endswith("\n" + OPEN)
    assert "enable_thinking: true" in (final / "README.md").read_text()
