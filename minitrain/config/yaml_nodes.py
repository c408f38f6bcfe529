"""YAML as a tree of nodes, checked before it is expanded: a few lines can stand for billions of values."""

from collections.abc import Iterator
from typing import ClassVar

import yaml

from minitrain.errors import ConfigError
from minitrain.io.redact import redact_urls

MAX_CHARACTERS = 1 << 20
MAX_VALUES = 10_000  # with the aliases expanded
MAX_DEPTH = 30
MAX_BITS = 1024  # of an integer: no float64 is larger


class _Loader(yaml.SafeLoader):
    """YAML as OmegaConf reads it, to which a date is a string."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def check_yaml(text: str, name: str) -> tuple[yaml.Node | None, dict[str, int]]:
    """Return the root of a YAML text, and the line of each value by its path like ``a.b[0].c``.

    Raises:
        ConfigError: The text is too large, or a value or a key cannot be read.
        yaml.YAMLError: The text is not YAML.
        RecursionError: It is nested without end.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(
            f"{name}: is too large for a configuration, got {len(text):,} characters. Name another file.", "too-large"
        )
    loader, lines = _Loader(text), {}
    try:
        node = loader.get_single_node()
        if node is not None:
            _walk(node, "", name, loader, lines, iter(range(MAX_VALUES)))
    finally:
        loader.dispose()
    return node, lines


def _walk(
    node: yaml.Node, path: str, name: str, loader: _Loader, lines: dict[str, int], budget: Iterator, depth: int = 0
) -> None:
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node, name, loader)
        return
    if next(budget, None) is None or depth > MAX_DEPTH:
        raise ConfigError(f"{name}: holds more than {MAX_VALUES} values, or they are nested too deeply.", "too-large")
    for key, place, value in _children(node, path, name):
        lines.setdefault(key, place.start_mark.line + 1)
        if next(budget, None) is None:
            raise ConfigError(
                f"{name}: holds more than {MAX_VALUES} values, or they are nested too deeply.", "too-large"
            )
        _walk(value, key, name, loader, lines, budget, depth + 1)


def _children(node: yaml.Node, path: str, name: str) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """Yield (path, node that has its line, node) of each value in a mapping or a sequence."""
    if isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield f"{path}[{number}]", value, value
        return
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(
                f"{name}:{key.start_mark.line + 1}: a key is a list or a mapping. Write `key: value`.", "invalid-yaml"
            )
        yield path if key.value == "<<" else f"{path}.{key.value}".lstrip("."), key, value


def _check_scalar(node: yaml.ScalarNode, name: str, loader: _Loader) -> None:
    """Raise ConfigError for a value that its tag does not fit, and for an integer without bounds."""
    text, short = node.value, redact_urls(node.value)
    short = short if len(short) <= 40 else f"{short[:37]}..."
    where, tag = f"{name}:{node.start_mark.line + 1}", node.tag.replace("tag:yaml.org,2002:", "!!")
    try:
        value = loader.construct_object(node)
    except yaml.YAMLError:
        raise
    except (ValueError, LookupError, AttributeError, TypeError):
        if tag == "!!int" and len(text) > 1000:
            raise ConfigError(
                f"{where}: {short} is a number of {len(text)} digits. Give a smaller one.", "too-large"
            ) from None
        raise ConfigError(f"{where}: {short!r} is not of the type {tag}. Leave the tag out.", "wrong-type") from None
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ConfigError(
            f"{where}: {short} is a number of {value.bit_length()} bits. Give a smaller one.", "too-large"
        )
