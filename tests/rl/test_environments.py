"""Environments: replies, tools, and tokens that stay as they were sampled."""

import pytest

from minitrain.config.issues import ConfigIssues, ConfigSource
from minitrain.data.template import Template
from minitrain.model.tiny import tiny_tokenizer
from minitrain.rl.calculator import calculate
from minitrain.rl.environments import Reply, build_environment
from minitrain.rl.episodes import text_after_response
from tests.rl.test_rounds import online  # noqa: F401 (a fixture)


@pytest.mark.parametrize(
    ("expression", "value"),
    [("37*46", "1702"), ("1/4", "0.25"), ("-(2 + 3) % 4", "3"), ("0.1+0.2", "0.3"), ("7//2", "3")],
)
def test_the_calculator(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize("expression", ["", "a", "open('x')", "2**9999", "1/0", "1" * 300, "[1]", "1 if 1 else 2"])
def test_the_calculator_only_calculates(expression):
    with pytest.raises(ValueError):
        calculate(expression)


def environment(entry):
    issues = ConfigIssues(ConfigSource("test"))
    make = build_environment(entry, issues)
    issues.raise_if_any()
    return make()


def test_tools_reply_to_calls_and_end_without():
    by_pattern = environment({"name": "tools", "tools": ["calculator"], "pattern": "calc (.+)"})
    assert by_pattern.reply({"role": "assistant", "content": "calc 2*3"}).messages[0]["content"] == "6"
    assert by_pattern.reply({"role": "assistant", "content": "calc x"}).messages[0]["content"].startswith("error: ")
    assert by_pattern.reply({"role": "assistant", "content": "6"}).messages == []
    by_template = environment({"name": "tools", "tools": ["calculator"]})
    call = {"id": "c1", "function": {"name": "calculator", "arguments": {"expression": "2*3"}}}
    reply = by_template.reply({"role": "assistant", "content": "", "tool_calls": [call]}).messages[0]
    assert reply == {"role": "tool", "content": "6", "name": "calculator", "tool_call_id": "c1"}
    other = {"id": "c2", "function": {"name": "search", "arguments": {}}}
    assert "unknown tool" in by_template.reply({"role": "assistant", "tool_calls": [other]}).messages[0]["content"]


def test_the_text_after_a_response_is_that_of_the_template():
    template = Template(tiny_tokenizer(), "chatml")
    messages = [{"role": "user", "content": "2*3"}, {"role": "assistant", "content": "calc 2*3"}]
    reply = [{"role": "tool", "content": "6"}]
    text = text_after_response(template, messages, reply, {}, "<|im_end|>")
    full = template.renderer.bind({}).prompt([*messages, *reply])
    assert full.endswith("calc 2*3<|im_end|>" + text)


def test_a_conversation_of_two_turns_is_trained_as_it_was_sampled(online):  # noqa: F811
    """What a tool replies is not a target; the sampled ids are in the round (silent RL bugs R21, R28)."""
    rollout = {"max_turns": 3, "environment": {"name": "tools", "tools": ["calculator"], "pattern": "(.)"}}
    trainer = online(rollout=rollout, n_steps=1)
    trainer.template.end_ids = lambda: list(range(3, 100))
    seen = []
    judge = trainer.train_loader.judge
    trainer.train_loader.judge = lambda groups: seen.extend(one for g in groups for one in g) or judge(groups)
    trainer.train()
    assert max(episode.turns for episode in seen) == 3
    cache = trainer.train_loader.examples.caches[0]
    trained = {(tuple(cache.ids[a:b].tolist()), tuple(cache.mask[a:b].tolist())) for a, b in spans(cache)}
    for episode in seen:
        n = len(episode.prompt.ids)
        assert (tuple(episode.prompt.ids + episode.ids), (0,) * n + tuple(map(int, episode.mask))) in trained
        assert sum(episode.mask) == sum(logp < 0 for logp in episode.logps)


@pytest.mark.parametrize("method", ["begin", "reply"])
def test_a_signal_ends_slow_environments(online, method):  # noqa: F811
    """After the call in which it arrives. Each call is progress for the watchdog."""
    rollout = {"max_turns": 2, "environment": {"name": "tools", "tools": ["calculator"], "pattern": "(.)"}}
    trainer, calls = online(rollout=rollout, n_steps=1), []
    trainer.template.end_ids = lambda: list(range(3, 100))

    class Slow:
        def begin(self, row, messages, seed):
            self.note("begin")
            return messages

        def reply(self, response):
            self.note("reply")
            return Reply([])

        def note(self, name):
            calls.append(name)
            if name == method:
                trainer._receive(15)

    trainer.train_loader.make_environment = Slow
    trainer.train()
    assert (trainer.signal, trainer.step, calls.count(method)) == (15, 0, 1)


def spans(cache):
    return zip(cache.offsets[:-1], cache.offsets[1:], strict=True)
