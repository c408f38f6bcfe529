"""Check the nodes of a YAML file before they are expanded, because a few lines can expand to billions of values."""

from collections.abc import Iterator
from typing import ClassVar

import yaml

from minitrain.errors import ConfigError
from minitrain.io.redact import redact_urls

MAX_CHARACTERS = 1 << 20
MAX_VALUES = 10_000  # with the aliases expanded
MAX_DEPTH = 30
MAX_BITS = 1024  # of an integer, as a float64 is smaller


class _Loader(yaml.SafeLoader):
    """Reads YAML as OmegaConf does, with dates as strings."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def check_yaml(text: str, name: str) -> tuple[yaml.Node | None, dict[str, int]]:
    """Return the root node of YAML, and the line of each value by its key, such as ``a.b[0].c``.

    Raises:
        ConfigError: If `text` is too large, or a key or value is invalid.
        yaml.YAMLError: If it is not YAML.
        RecursionError: If it is nested too deeply for the parser.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(
            f"{name}: is too large for a config, got {len(text):,} characters. Give another file.", "too-large"
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
    if depth > MAX_DEPTH:
        raise ConfigError(f"{name}: is nested more than {MAX_DEPTH} levels deep. Simplify it.", "too-large")
    for key, start, value in _children(node, path, name):
        lines.setdefault(key, start.start_mark.line + 1)
        if next(budget, None) is None:
            raise ConfigError(f"{name}: has more than {MAX_VALUES} values. Simplify it.", "too-large")
        _walk(value, key, name, loader, lines, budget, depth + 1)


def _children(node: yaml.Node, path: str, name: str) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """Yield (path, node at whose line it starts, node) for each value in a mapping or a sequence."""
    if isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield f"{path}[{number}]", value, value
        return
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            where = f"{name}:{key.start_mark.line + 1}"
            raise ConfigError(
                f"{where}: expected a string as key, got a list or a mapping. Write `key: value`.", "invalid-yaml"
            )
        yield path if key.value == "<<" else f"{path}.{key.value}".lstrip("."), key, value


def _check_scalar(node: yaml.ScalarNode, name: str, loader: _Loader) -> None:
    """Raise ConfigError for a value that does not fit its tag, and for an integer that is too large."""
    text, short = node.value, redact_urls(node.value)
    short = short if len(short) <= 40 else f"{short[:37]}..."
    where, tag = f"{name}:{node.start_mark.line + 1}", node.tag.replace("tag:yaml.org,2002:", "!!")
    try:
        value = loader.construct_object(node)
    except yaml.YAMLError:
        raise
    except (ValueError, LookupError, AttributeError, TypeError):
        if tag == "!!int" and len(text) > 1000:
            raise ConfigError(f"{where}: {short} has {len(text)} digits. Use a smaller number.", "too-large") from None
        raise ConfigError(f"{where}: {short!r} does not fit the tag {tag}. Remove the tag.", "wrong-type") from None
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ConfigError(f"{where}: {short} has {value.bit_length()} bits. Use a smaller number.", "too-large")
