"""Dataclass fields that are options, with help, limits and aliases."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")
MAX_NUMBER = 1_000_000_000  # of an option without an upper bound: more is a typo, and overflows somewhere
MIN_FRACTION = 1e-30  # a number closer to 0 is 0 in float32, or its inverse overflows
MAX_SEED = 2**63 - 1  # the limit of torch
OLD_LIMITS = {"least": "ge", "above": "gt", "below": "lt", "most": "le"}


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    ge: float | None = None,
    gt: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    alias: str | Sequence[str] = (),
    spellings: Mapping[str, str] | None = None,
    affects_results: bool = True,
    **old: Any,
) -> Any:
    """Return a dataclass field with its help and limits.

    Args:
        ge, gt, lt, le: Bounds of a number (>=, >, <, <=). The default upper bound is `MAX_NUMBER`.
        alias: Other names of the option, one or several.
        spellings: Choices by other ways to write them in lower case, such as {"true": "full"}; null is "none".
        affects_results: Whether the option changes what is computed. If not, a run may resume with another value.
        old: `least`, `above`, `below`, `most` and `free=True`, the names in 0.1.0 of `ge`, `gt`, `lt`, `le` and
            `affects_results=False`.
    """
    limits = {"ge": ge, "gt": gt, "lt": lt, "le": le}
    affects_results = not old.pop("free", not affects_results)
    for name in OLD_LIMITS.keys() & old:
        limits[OLD_LIMITS[name]] = old.pop(name)
    if old:
        raise TypeError(f"option() got an unexpected keyword argument {next(iter(old))!r}")
    names = (alias,) if isinstance(alias, str) else tuple(alias)
    metadata = dict(help=help, choices=choices, aliases=names, affects_results=affects_results, **limits)
    metadata["spellings"] = spellings or {}
    if default is MISSING:
        return field(metadata=metadata)
    if isinstance(default, (list, dict)) or callable(default):
        factory = default if callable(default) else lambda: type(default)(default)
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def show_options(summary: str) -> Callable[[type[T]], type[T]]:
    """Return a decorator for dataclasses: help() explains each option, and repr() omits options at their default."""

    def decorate(cls: type[T]) -> type[T]:
        lines = [f"    {f.name}: {f.metadata['help']}" for f in fields(cls) if f.metadata.get("help")]
        cls.__doc__ = "\n".join([summary, "", "Attributes:", *lines])
        cls.__repr__ = _repr
        return cls

    return decorate


def _repr(options: Any) -> str:
    shown = [f.name for f in fields(options) if f.repr and not _is_default(f, getattr(options, f.name))]
    return f"{type(options).__name__}({', '.join(f'{name}={getattr(options, name)!r}' for name in shown)})"


def _is_default(f: Field, value: Any) -> bool:
    if is_dataclass(value) or isinstance(f.default_factory, type):
        return repr(value) == f"{type(value).__name__}()"
    return value == (f.default if f.default_factory is MISSING else f.default_factory())
