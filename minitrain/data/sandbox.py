"""Render chat templates in bounded time and memory.

Jinja's sandbox does not limit time and memory: nested ranges, a string that doubles in a loop, or `'a' * 10**10` take
hours or all memory. So each loop iteration, call and operation counts the size of its result, and a rendering has a
budget. The rendered text does not change.
"""

import functools
import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from .messages import CLOSE, OPEN, Messages

MAX_SECONDS = 5.0
CLOCK_EVERY = 256  # counted operations between two looks at the clock
MAX_SIZE = 10_000_000  # characters and items that one rendering may create
SIZE_PER_CHARACTER = 2000  # additional budget per character, because some templates append them one by one
SIZED = (str, bytes, list, tuple, dict, range)
# Filters that do not convert the items of a list to text.
NON_PRINTING = {
    "length",
    "count",
    "list",
    "first",
    "last",
    "map",
    "select",
    "reject",
    "selectattr",
    "rejectattr",
    "attr",
}
NON_PRINTING |= {
    "default",
    "d",
    "items",
    "dictsort",
    "sort",
    "unique",
    "reverse",
    "sum",
    "min",
    "max",
    "random",
    "groupby",
}
NON_PRINTING |= {"batch", "slice"}
_DICT_METHODS = frozenset(dir(dict))
Span = tuple[int, int]
_MARK = re.compile(f"[{OPEN}{CLOSE}]")


class UnboundedTemplate(jinja2.TemplateRuntimeError):
    """A template exceeds its limit of time or memory."""


def render(source: str, messages: Messages, **variables: Any) -> str:
    """Return the same text as `apply_chat_template` of transformers.

    Raises:
        jinja2.TemplateError: The template is invalid, refuses the conversation, or exceeds its limits.
    """
    return _render(source, False, messages, variables)


def render_marked(source: str, messages: Messages, **variables: Any) -> tuple[str, list[Span]]:
    """Return the same text, and its {% generation %} spans, without those whose text the template changes later."""
    parts = _MARK.split(_render(source, True, messages, variables))
    ends = [0, *itertools.accumulate(map(len, parts))]
    return "".join(parts), list(zip(ends[1:-1:2], ends[2::2]))


def _render(source: str, is_marked: bool, messages: Messages, variables: dict[str, Any]) -> str:
    """Return the text of a template, and raise errors in its expressions as TemplateError."""
    try:
        template = _compile(source, is_marked)
        template.environment.start([messages, variables.get("tools")])
        return template.render({"messages": messages, "tools": None, "documents": None} | variables)
    except (RecursionError, SyntaxError):  # SyntaxError: of the Python code that Jinja generates
        raise UnboundedTemplate("it is nested too deeply") from None
    except MemoryError:
        raise UnboundedTemplate("it needs more memory than is available") from None
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise jinja2.TemplateRuntimeError(f"{type(error).__name__}: {error}") from None


@functools.lru_cache(maxsize=32)
def _compile(source: str, is_marked: bool) -> jinja2.Template:
    """Return a compiled template, which writes OPEN and CLOSE around {% generation %} blocks with `is_marked`."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # transformers creates its environment, with its own filters and tags, in this function. `__wrapped__` avoids its
    # cache, so the environment is not shared, and its class can be replaced before it compiles the template.
    environment = _compile_jinja_template.__wrapped__("").environment
    environment.__class__ = _Bounded
    environment.bind()
    environment.add_extension(_MarkedGeneration if is_marked else _Generation)
    template = environment.from_string(source)
    template.globals = dict(template.globals)  # each rendering copies them, ten times as fast as jinja's ChainMap
    return template


class _Generation(Extension):
    """Parses {% generation %} as a scope, which is faster than the call that transformers parses it as."""

    tags = frozenset({"generation"})
    is_marked = False

    def parse(self, parser: Parser) -> nodes.Scope:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        if self.is_marked:
            before, after = (nodes.Output([nodes.TemplateData(mark)], lineno=lineno) for mark in (OPEN, CLOSE))
            body = [before, *body, after]
        return nodes.Scope(body, lineno=lineno)


class _MarkedGeneration(_Generation):
    is_marked = True


class _Bounded(ImmutableSandboxedEnvironment):
    """An environment whose templates count the size of everything they create."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def bind(self) -> None:
        """Wrap filters and `{{ ... }}` to count their results; replaces __init__, which another class has run."""
        self.filters = {name: self._count_calls(name, function) for name, function in self.filters.items()}
        self.filters |= {"_count_loop": self._count_loop, "_count": self._count, "_count_joined": self._count_joined}
        self.globals = {name: value for name, value in self.globals.items() if name != "lipsum"}  # makes random text
        self.finalize = self._count_printed
        self.start([])

    def start(self, texts: list) -> None:
        """Set the budget to render texts, in nested objects and lists."""
        self.budget, self.texts = MAX_SIZE, texts
        self.deadline, self.until_clock = time.monotonic() + MAX_SECONDS, CLOCK_EVERY

    def spend(self, size: int) -> None:
        """Subtract from the budget, and raise UnboundedTemplate if it is exhausted or the time is over."""
        self.budget -= size
        self.until_clock -= 1
        if self.budget < 0:  # few need more, so the characters are not counted before
            self.budget += SIZE_PER_CHARACTER * _n_characters(self.texts)
            self.texts = []
        late = False
        if self.until_clock < 0:
            self.until_clock, late = CLOCK_EVERY, time.monotonic() > self.deadline
        if self.budget < 0 or late:
            raise UnboundedTemplate("it does not terminate, or creates much more text than the conversation has")

    def _count(self, value: Any) -> Any:
        """Count the size of a value, and return it."""
        self.spend(len(value) if isinstance(value, SIZED) else 1)
        return value

    def _count_printed(self, value: Any) -> Any:
        """Count a value with all its items, because it is converted to text, and return it."""
        if isinstance(value, str):  # almost always, so without another call
            self.spend(len(value))
            return value
        self._count(value)
        if isinstance(value, (list, tuple, dict)):
            for item in (*value, *value.values()) if isinstance(value, dict) else value:
                self._count_printed(item)
        return value

    def _count_joined(self, value: Any) -> Any:
        """Count an operand of a concatenation, and return it; the text of a list can be much longer than the list."""
        return self._count_printed(value) if isinstance(value, (list, tuple, dict)) else value

    def _count_loop(self, values: Iterable, size: int) -> Iterator:
        """Yield the values of a loop whose body prints `size` characters per iteration."""
        for value in values:
            self.spend(size)
            yield value

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _CountingTransformer().visit(super()._parse(source, name, filename))

    def _count_calls(self, name: str, function: Callable) -> Callable:
        """Return a filter that counts the size of its arguments and its result."""

        @functools.wraps(function)
        def counted(*args, **kwargs):
            self._count_before_call(name, (*args, *kwargs.values()))
            for argument in () if name in NON_PRINTING else args:
                self._count_printed(argument)
            return self._count(function(*args, **kwargs))

        return counted

    def call(self, context, function, *args, **kwargs):
        """Override the sandbox's call of a function or method."""
        if isinstance(function, LoopContext) and args:  # {% for ... recursive %}
            args = (self._count_loop(args[0], 1), *args[1:])
        name = getattr(function, "__name__", "")
        for argument in args if name in MULTIPLYING else ():
            self._count_printed(argument)
        self._count_before_call(name, (getattr(function, "__self__", None), *args, *kwargs.values()))
        return self._count(super().call(context, function, *args, **kwargs))

    def getattr(self, obj, attribute):
        """Override the sandbox's lookup to be faster for a key of an object."""
        if type(obj) is dict and attribute in obj and attribute not in _DICT_METHODS:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def wrap_str_format(self, value):
        """Override the sandbox's wrapper of `str.format`, which loses the format string that `call` needs."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            wrapped.__self__ = value.__self__
        return wrapped

    def call_binop(self, context, operator, left, right):
        if operator in ("*", "**"):
            self.spend(_product(operator, left, right))
        elif operator == "%" and isinstance(left, str):
            self._count_printed(right)
            self._count_before_call("format", (left, *right) if isinstance(right, tuple) else (left, right))
        return self._count(super().call_binop(context, operator, left, right))

    def _count_before_call(self, name: str, args: tuple) -> None:
        """Count the size of a result before it exists: an integer may be a width, and some functions multiply text."""
        self.spend(1 + sum(abs(argument) for argument in args if type(argument) is int))
        if name in MULTIPLYING:
            texts = [argument for argument in args if isinstance(argument, str)]
            if texts and len(args) > 1:
                self.spend(MULTIPLYING[name](texts, max(map(_size, args))))


def _format_size(texts: list[str], longest: int) -> int:
    """Return the sum of the widths in a format, plus its longest argument at each field."""
    widths = sum(map(int, re.findall(r"\d{4,18}", texts[0])))
    return widths + (texts[0].count("{") + texts[0].count("%")) * longest


def _replace_size(texts: list[str], longest: int) -> int:
    return texts[0].count(texts[1]) * len(texts[2]) if len(texts) > 2 and len(texts[2]) > len(texts[1]) else 0


def _join_size(texts: list[str], longest: int) -> int:
    return longest * max(map(len, texts)) if max(map(len, texts)) > 100 else longest


# Function -> upper bound of its result's size, from its string arguments and the size of its largest argument.
MULTIPLYING = {
    "format": _format_size,
    "format_map": _format_size,
    "replace": _replace_size,
    "join": _join_size,
    "indent": _join_size,
    "wordwrap": _join_size,
}


class _CountingTransformer(NodeTransformer):
    """Adds filters that count the iterations of loops and the results of concatenations.

    It also removes marks from blocks whose text the template may change later, such as that of a macro.
    """

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        if node.recursive:
            _remove_marks(node)
        size = 1 + sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        node.iter = nodes.Filter(node.iter, "_count_loop", [nodes.Const(size)], [], None, None, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Node) -> nodes.Node:
        self.generic_visit(node)
        _remove_marks(node)
        return node

    visit_CallBlock = visit_FilterBlock = visit_AssignBlock = visit_Macro

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        node.nodes = [nodes.Filter(one, "_count_joined", [], [], None, None, lineno=node.lineno) for one in node.nodes]
        return nodes.Filter(node, "_count", [], [], None, None, lineno=node.lineno)


def _remove_marks(node: nodes.Node) -> None:
    for text in node.find_all(nodes.TemplateData):
        text.data = _MARK.sub("", text.data)


def _n_characters(value: Any) -> int:
    """Return the number of characters of the keys and the values in nested objects and lists."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(str(key)) + _n_characters(each) for key, each in value.items())
    return sum(map(_n_characters, value)) if isinstance(value, list) else len(str(value))


def _size(value: Any) -> int:
    """Return the number of characters or items; 1 for other values."""
    return len(value) if isinstance(value, SIZED) else 1


def _product(operator: str, left: Any, right: Any) -> int:
    """Return an upper bound of the size of a product or power; the size of an integer is its number of bits."""
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
    times = next((factor for factor in (left, right) if isinstance(factor, int)), 1)
    return _size(left) * _size(right) * max(times, 1)
