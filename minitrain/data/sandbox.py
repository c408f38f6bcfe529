"""Chat templates rendered in bounded time and memory.

Jinja's sandbox keeps a template away from the machine, but not from its time and memory: nested ranges, text that
doubles in a loop or `'a' * 10**10` take hours or all memory. So each pass of a loop, each call and each operation
counts the size of what it makes, and a rendering has a budget. What is rendered stays the same.
"""

import contextlib
import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 5.0
CLOCK_EVERY = 256  # of what is counted
MAX_SIZE = 10_000_000  # characters and items that are made while one conversation is rendered
SIZE_PER_CHARACTER = 2000  # and for each character of the conversation, since some templates build it up bit by bit
SIZED = (str, bytes, list, tuple, dict, range)
LOOKING = {"length", "count", "list", "first", "last", "map", "select", "reject", "selectattr", "rejectattr", "attr"}
LOOKING |= {"default", "d", "items", "dictsort", "sort", "unique", "reverse", "sum", "min", "max", "random", "groupby"}
LOOKING |= {"batch", "slice"}  # filters that do not write what is in a list
Span = tuple[int, int]


class UnboundedTemplate(jinja2.TemplateRuntimeError):
    """A template does not end in its bounds."""


def render(source: str, messages: list[dict[str, str]], **variables: Any) -> str:
    """Return what transformers' `apply_chat_template` returns for a template and these variables.

    Raises:
        jinja2.TemplateError: The template is wrong, refuses the conversation, or does not end in its bounds.
    """
    with _rendering(source, messages) as template:
        return template.render(messages=messages, tools=None, documents=None, **variables)


def render_marked(source: str, messages: list[dict[str, str]], **variables: Any) -> tuple[str, list[Span]]:
    """Return the same, and the spans of the text that are in {% generation %}."""
    blocks: list[str] = []
    spans: list[Span] = []
    with _rendering(source, messages) as template, template.environment.activate_tracker(blocks, spans):
        for block in template.generate(messages=messages, tools=None, documents=None, **variables):
            blocks.append(block)
    return "".join(blocks), spans


@contextlib.contextmanager
def _rendering(source: str, messages: list[dict[str, str]]) -> Iterator[jinja2.Template]:
    """Inside, whatever a template's own expressions raise is an error of the template."""
    try:
        template = _compile(source)
        template.environment.start(sum(len(message["content"]) for message in messages))
        yield template
    except (RecursionError, SyntaxError):  # SyntaxError: of Python, which Jinja makes of a template
        raise UnboundedTemplate("it is nested without end") from None
    except MemoryError:
        raise UnboundedTemplate("it needs more memory than there is") from None
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise jinja2.TemplateRuntimeError(f"{type(error).__name__}: {error}") from None


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # transformers makes its environment in this function, with the filters and the tag that its templates know. A
    # template is compiled by the class that it has then; this one was made for the empty template, and is ours alone.
    environment = _compile_jinja_template.__wrapped__("").environment
    environment.__class__ = _Bounded
    environment.bind()
    return environment.from_string(source)


class _Bounded(ImmutableSandboxedEnvironment):
    """An environment whose templates count the size of all that they make."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def bind(self) -> None:
        """Count what filters and `{{ ... }}` make, too; for an environment that was made with another class."""
        self.filters = {name: self._counted(name, one) for name, one in self.filters.items()} | {
            "_passes": self._passes
        }
        self.globals = {name: one for name, one in self.globals.items() if name != "lipsum"}  # random words
        self.filters["_made"], self.filters["_joined"] = self._made, self._joined
        self.finalize = self._written
        self.start(0)

    def start(self, n_characters: int) -> None:
        """Begin the rendering of a conversation of so many characters."""
        self.left = MAX_SIZE + SIZE_PER_CHARACTER * n_characters
        self.deadline, self.until_clock = time.monotonic() + MAX_SECONDS, CLOCK_EVERY

    def spend(self, size: int) -> None:
        """Raise UnboundedTemplate when the rendering has made more than it may, or has taken too long."""
        self.left -= size
        self.until_clock -= 1
        late = False
        if self.until_clock < 0:
            self.until_clock, late = CLOCK_EVERY, time.monotonic() > self.deadline
        if self.left < 0 or late:
            raise UnboundedTemplate("it does not end, or makes much more text than the conversation has")

    def _made(self, value: Any) -> Any:
        self.spend(len(value) if isinstance(value, SIZED) else 1)
        return value

    def _written(self, value: Any) -> Any:
        """The value, all that is in it counted as text."""
        self._made(value)
        if isinstance(value, (list, tuple, dict)):
            for one in (*value, *value.values()) if isinstance(value, dict) else value:
                self._written(one)
        return value

    def _joined(self, value: Any) -> Any:
        """The value; a list in it may be much longer as text than it is."""
        return self._written(value) if isinstance(value, (list, tuple, dict)) else value

    def _passes(self, values: Iterable, size: int) -> Iterator:
        """The values of a loop whose body writes `size` characters in each pass."""
        for value in values:
            self.spend(size)
            yield value

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Counting().visit(super()._parse(source, name, filename))

    def _counted(self, name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def counted(*args, **kwargs):
            self._before(name, (*args, *kwargs.values()))
            for one in () if name in LOOKING else args:
                self._written(one)
            return self._made(function(*args, **kwargs))

        return counted

    def call(self, context, function, *args, **kwargs):
        """As the sandbox calls a function or a method."""
        if isinstance(function, LoopContext) and args:  # {% for ... recursive %}
            args = (self._passes(args[0], 1), *args[1:])
        name = getattr(function, "__name__", "")
        for one in args if name in MULTIPLYING else ():
            self._written(one)
        self._before(name, (getattr(function, "__self__", None), *args, *kwargs.values()))
        return self._made(super().call(context, function, *args, **kwargs))

    def wrap_str_format(self, value):
        """As the sandbox wraps `str.format`, with the text that it belongs to."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            wrapped.__self__ = value.__self__
        return wrapped

    def call_binop(self, context, operator, left, right):
        if operator in ("*", "**"):
            self.spend(_product(operator, left, right))
        elif operator == "%" and isinstance(left, str):
            self._written(right)
            self._before("format", (left, *right) if isinstance(right, tuple) else (left, right))
        return self._made(super().call_binop(context, operator, left, right))

    def _before(self, name: str, given: tuple) -> None:
        """Count what a function will make of its arguments: an integer may be a width, and some multiply texts."""
        size = 1
        for one in given:
            size += abs(one) if type(one) is int else 0
        self.spend(size)
        if name in MULTIPLYING:
            texts = [one for one in given if isinstance(one, str)]
            if texts and len(given) > 1:
                self.spend(MULTIPLYING[name](texts, max(map(_size, given))))


def _of_format(texts: list[str], longest: int) -> int:
    """The widths in a format, and its longest argument wherever there is room for one."""
    widths = sum(map(int, re.findall(r"\d{4,18}", texts[0])))
    return widths + (texts[0].count("{") + texts[0].count("%")) * longest


def _of_replace(texts: list[str], longest: int) -> int:
    return texts[0].count(texts[1]) * len(texts[2]) if len(texts) > 2 and len(texts[2]) > len(texts[1]) else 0


def _of_join(texts: list[str], longest: int) -> int:
    return longest * max(map(len, texts)) if max(map(len, texts)) > 100 else longest


MULTIPLYING = {
    "format": _of_format,
    "format_map": _of_format,
    "replace": _of_replace,
    "join": _of_join,
    "indent": _of_join,
    "wordwrap": _of_join,
}  # functions -> the size of what they make, of the texts among their arguments and the size of the longest one


class _Counting(NodeTransformer):
    """Loops and concatenations whose passes and results are counted."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        size = 1 + sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        node.iter = nodes.Filter(node.iter, "_passes", [nodes.Const(size)], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        node.nodes = [nodes.Filter(one, "_joined", [], [], None, None, lineno=node.lineno) for one in node.nodes]
        return nodes.Filter(node, "_made", [], [], None, None, lineno=node.lineno)


def _size(value: Any) -> int:
    """Characters or items of what has some."""
    return len(value) if isinstance(value, SIZED) else 1


def _product(operator: str, left: Any, right: Any) -> int:
    """The size of what a product or a power makes; of an integer that is the number of its bits."""
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
    times = next((one for one in (left, right) if isinstance(one, int)), 1)
    return _size(left) * _size(right) * max(times, 1)
