"""Environments: what replies to a response, and so makes a conversation of several turns."""

import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from minitrain.config.issues import ConfigIssues, check_types, regex_error
from minitrain.config.option import option
from minitrain.config.suggest import hint_for_value
from minitrain.data.messages import Message, Messages
from minitrain.errors import ConfigError, MinitrainError, RunError, short

from .calculator import calculate


class Reply(NamedTuple):
    """The reply of an environment to a response.

    Attributes:
        messages: The turns before the next response; without any, the conversation ends.
        reward: Reward for this response.
    """

    messages: Messages
    reward: float = 0.0


class Environment(Protocol):
    """Replies to the responses of one conversation."""

    def begin(self, row: Mapping[str, Any], messages: Messages, seed: int) -> Messages:
        """Return the turns before the first response.

        Args:
            row: The data row.
            messages: Its prompt.
            seed: Seed of the round and the prompt.
        """
        ...

    def reply(self, response: Message) -> Reply:
        """Return the reply to a response, with its `content` and, if it has some, `tool_calls`."""
        ...


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a method of an environment.

    Raises:
        RunError: It raises an error.
    """
    try:
        return function(*arguments)
    except MinitrainError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise RunError(
            f"rollout.environment: {function.__qualname__} failed at {frame.filename}:{frame.lineno}: "
            f"{type(error).__name__}: {error}. Correct the environment.",
            "plugin-failed",
        ) from error


class EnvironmentClass(NamedTuple):
    make: Callable[[Any], Environment]  # options -> an environment for one conversation
    options_class: type


_REGISTRY: dict[str, EnvironmentClass] = {}
TOOLS: dict[str, Callable[..., Any]] = {"calculator": calculate}


def register_environment(name: str, options_class: type) -> Callable[[type], type]:
    """Register the decorated class, whose constructor gets the options, as an environment."""

    def register(cls: type) -> type:
        if name in _REGISTRY and repr(_REGISTRY[name].make) != repr(cls):
            raise ConfigError(
                f"an environment named {name!r} is already registered. Use another name.", "already-exists"
            )
        _REGISTRY[name] = EnvironmentClass(cls, options_class)
        return cls

    return register


def register_tool(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register a function as a tool under its name. Its result is the content of the tool's turn."""
    TOOLS[function.__name__] = function
    return function


def build_environment(entry: Any, issues: ConfigIssues) -> Callable[[], Environment] | None:
    """Return a function that makes an environment for each conversation; None without one.

    Problems of `rollout.environment` are added to `issues`.
    """
    key = "rollout.environment"
    if entry is None:
        return None
    entry = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        issues.add(key, "wrong-type", f"expected a name or a mapping with `name`, got {short(entry)!r}.")
        return None
    name = entry["name"]
    if name not in _REGISTRY:
        hint = hint_for_value(key, name, _REGISTRY)
        issues.add(key, "not-a-choice", f"unknown environment {name!r}. Use one of {', '.join(_REGISTRY)}.{hint}")
        return None
    known = _REGISTRY[name]
    options = check_types(known.options_class, {k: v for k, v in entry.items() if k != "name"}, f"{key}.", issues)
    if issues:
        return None
    if name == "tools":
        _check_tools(ToolsOptions(**options), key, issues)
    return lambda: known.make(known.options_class(**options))


def _check_tools(options: "ToolsOptions", key: str, issues: ConfigIssues) -> None:
    """Check the tools of the built-in environment."""
    for tool in options.tools:
        if tool not in TOOLS:
            message = f"unknown tool {tool!r}. Use one of {', '.join(TOOLS)}, or register it with --plugin."
            issues.add(f"{key}.tools", "not-a-choice", message)
    if options.pattern is None:
        return
    if error := regex_error(options.pattern):
        message = f"{options.pattern!r} is not a valid regular expression: {error}."
        issues.add(f"{key}.pattern", "invalid-value", message)
    elif len(options.tools) != 1 or re.compile(options.pattern).groups < 1:
        message = "needs one tool, and one group for its argument, such as `calc (.+)`. Change it."
        issues.add(f"{key}.pattern", "invalid-value", message)


@dataclass
class ToolsOptions:
    tools: list[str] = option([], "Names of registered functions, such as calculator.")
    pattern: str | None = option(
        None,
        "Regular expression of a call of the only tool, whose first group is the argument (default: calls in the "
        "syntax of the chat template).",
    )


@register_environment("tools", ToolsOptions)
class Tools:
    """Calls functions, and replies with their results. A response without a call ends the conversation."""

    def __init__(self, options: ToolsOptions):
        self.options = options
        self.tools = {name: TOOLS[name] for name in options.tools}

    def begin(self, row: Mapping[str, Any], messages: Messages, seed: int) -> Messages:
        return messages

    def reply(self, response: Message) -> Reply:
        if self.options.pattern is not None:
            match = re.search(self.options.pattern, response["content"])
            if match is None:
                return Reply([])
            return Reply([{"role": "tool", "content": self._call(next(iter(self.tools)), [match[1]], {})}])
        calls = response.get("tool_calls") or []
        return Reply([self._answer(call) for call in calls])

    def _answer(self, call: Mapping[str, Any]) -> Message:
        function = call["function"]
        content = self._call(function["name"], [], function.get("arguments") or {})
        answer: Message = {"role": "tool", "content": content, "name": function["name"]}
        return answer | ({"tool_call_id": call["id"]} if call.get("id") else {})

    def _call(self, name: str, positional: Sequence[Any], named: Mapping[str, Any]) -> str:
        """Return the result of a tool, or its error, which the model reads."""
        if name not in self.tools:
            return f"error: unknown tool {name}"
        try:
            return str(self.tools[name](*positional, **named))
        except Exception as error:
            return f"error: {error}"
