"""Chat templates to test with: those of the package trl, if it is installed, with conversations of every kind."""

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from minitrain.config.sections import DatasetConfig
from minitrain.data.encode import TruncationConfig, encode
from minitrain.data.examples import Conversation, to_example
from minitrain.data.template import Template
from minitrain.data.text_encoder import Tokens
from minitrain.errors import DataError
from minitrain.model.tiny import tiny_tokenizer

Row = dict[str, Any]
MODES = ("all_turns", "each_turn", "last_turn")
# Beginning of a template's name -> the tokens of its models that begin a text and end a turn.
SPECIAL_TOKENS = {
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "diffusion_gemma": ("<bos>", "<turn|>"),
    "gemma4": ("<bos>", "<turn|>"),
    "gemma": ("<bos>", "<end_of_turn>"),
    "glm4": (None, "<|endoftext|>"),
    "gptoss": ("<|startoftext|>", "<|return|>"),
    "idefics": ("<|begin_of_text|>", "<end_of_utterance>"),
    "lfm2": ("<|startoftext|>", "<|im_end|>"),
    "llama": ("<|begin_of_text|>", "<|eot_id|>"),
    "llava": ("<s>", "</s>"),
    "muse": ("<|begin_of_text|>", "<|eot|>"),
    "phi3": ("<s>", "<|endoftext|>"),
    "smolvlm": ("<|im_start|>", "<end_of_utterance>"),
    "": (None, "<|im_end|>"),
}
_TOKEN = re.compile(
    r"<\|[^<>\s]{1,30}?\|?>|<[a-z_]{1,20}\|>|<｜[^｜<>]{1,30}｜>|</?s>|<(?:start|end)_of_\w+>|\[gMASK\]|<sop>|<bos>"
)


def turn(role: str, content: str, **keys: Any) -> Row:
    return {"role": role, "content": content, **keys}


def call(name: str, **arguments: Any) -> Row:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str) -> Row:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "c"}},
        "required": ["city"],
    }
    return {"type": "function", "function": {"name": name, "description": f"Ask for {name}.", "parameters": parameters}}


TOOLS = [tool("get_weather"), tool("get_time")]
_ASK, _WEATHER, _RESULT = turn("user", "Hi there"), turn("user", "Weather in Rome"), turn("tool", '{"t": 21}')
_HELLO, _DEGREES = turn("assistant", "Hello friend"), turn("assistant", "It is 21 degrees")
_CALL = call("get_weather", city='Rome é"x')
_GREETS, _LEAVES = {"reasoning_content": "The user greets me."}, {"reasoning_content": "He wants to leave now."}
_TO_CALL, _SAYS = {"reasoning_content": "I should call the tool."}, {"reasoning_content": "The tool says so, fine."}


def _rows() -> Iterator[tuple[str, Row]]:
    yield "plain", {"messages": [_ASK, _HELLO]}
    yield "system", {"messages": [turn("system", "Be brief, please."), _ASK, _HELLO]}
    yield "turns", {"messages": [_ASK, _HELLO, turn("user", "And now"), turn("assistant", "Good bye then")]}
    calls = turn("assistant", "", tool_calls=[_CALL])
    yield "call", {"tools": TOOLS, "messages": [_WEATHER, calls, _RESULT, _DEGREES]}
    with_text = turn("assistant", "Let me look", tool_calls=[_CALL])
    yield "call with text", {"tools": TOOLS, "messages": [_WEATHER, with_text, _RESULT, _DEGREES]}
    both = turn("assistant", "", tool_calls=[_CALL, call("get_time", city="Oslo")])
    results = [_RESULT, turn("tool", '{"h": 9}')]
    yield "parallel calls", {"tools": TOOLS, "messages": [_WEATHER, both, *results, _DEGREES]}
    yield "reasoning", {"messages": [_ASK, _HELLO | _GREETS]}
    bye = [turn("user", "And now"), turn("assistant", "Good bye then", **_LEAVES)]
    yield "reasoning, turns", {"messages": [_ASK, _HELLO | _GREETS, *bye]}
    yield "reasoning, call", {"tools": TOOLS, "messages": [_WEATHER, calls | _TO_CALL, _RESULT, _DEGREES | _SAYS]}


CASES = dict(_rows())


def trl_templates() -> dict[str, str]:
    """Return the templates that trl has, by name; none if it is not installed. It is not imported, which takes long."""
    spec = importlib.util.find_spec("trl")
    folder = Path(spec.origin).parent / "chat_templates" if spec and spec.origin else Path()
    return {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.jinja"))} if spec else {}


def trl_version() -> str | None:
    return importlib.metadata.version("trl") if importlib.util.find_spec("trl") else None


def make_tokenizer(name: str, source: str):
    """Return the tokenizer with one token per byte, and the special tokens that a template writes."""
    tokenizer = tiny_tokenizer()
    bos, eos = next(tokens for beginning, tokens in SPECIAL_TOKENS.items() if name.startswith(beginning))
    names = {"eos_token": eos} | ({"bos_token": bos} if bos else {})
    tokenizer.add_special_tokens(names)
    extra = sorted(set(_TOKEN.findall(source)) - set(names.values()))
    tokenizer.add_special_tokens({"extra_special_tokens": extra}, replace_extra_special_tokens=False)
    tokenizer.chat_template = source
    return tokenizer


class Outcome(NamedTuple):
    """What became of a row: its documents, or why it is refused."""

    template: Template
    example: Conversation
    documents: list[Tokens]
    error: DataError | None


def try_case(name: str, source: str, case: str, train_on: str) -> Outcome:
    """Encode a case; templates that know enable_thinking are told whether it has reasoning."""
    row = CASES[case]
    if "enable_thinking" in source:
        row = row | {"chat_template_kwargs": {"enable_thinking": case.startswith("reasoning")}}
    template = Template(make_tokenizer(name, source), train_on=train_on)
    example = to_example(row, DatasetConfig(path="x"))
    try:
        documents = encode(example, template, TruncationConfig(1 << 16))
    except DataError as error:
        return Outcome(template, example, [], error)
    assert isinstance(documents, list)
    return Outcome(template, example, documents, None)
