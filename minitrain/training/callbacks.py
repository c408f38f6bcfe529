"""Hooks: functions that the trainer calls, from keyword arguments of `Trainer` and methods of callback objects."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from minitrain.config.schema import Config, aliases, option_fields
from minitrain.config.suggest import suggest
from minitrain.errors import ConfigError

if TYPE_CHECKING:
    from minitrain.trainer import Trainer

Hook = Callable[["Trainer"], object]


class Hooks(TypedDict, total=False):
    """The functions of each hook: one, or several that are called in order."""

    on_train_begin: Hook | Sequence[Hook]
    on_step_end: Hook | Sequence[Hook]
    on_eval_end: Hook | Sequence[Hook]
    on_save: Hook | Sequence[Hook]
    on_train_end: Hook | Sequence[Hook]


OTHER_NAMES = {  # arguments of the trainers of transformers and TRL
    "args": "config",
    "processing_class": "tokenizer",
    "compute_loss_func": "loss",
    "optimizer_cls_and_kwargs": "optimizer",
    "peft_config": "the option lora",
    "ref_model": "the option loss.reference",
}
HOOKS = tuple(Hooks.__annotations__)


def collect_hooks(
    callbacks: Iterable[Any], keywords: Mapping[str, Any], arguments: Iterable[str]
) -> dict[str, list[Hook]]:
    """Return the functions of each hook, in call order.

    Args:
        callbacks: Objects with methods named like hooks.
        keywords: One or several functions, by hook name.
        arguments: Names of the other arguments of `Trainer`, for suggestions.

    Raises:
        ConfigError: For a name that is not a hook, and for an object that is not callable.
    """
    hooks: dict[str, list[Hook]] = {name: [] for name in HOOKS}
    if isinstance(callbacks, (str, bytes)) or not isinstance(callbacks, Iterable):
        raise ConfigError(f"callbacks: expected a list of objects, got {callbacks!r}.", "wrong-type")
    for callback in callbacks:
        for name in _methods(callback):
            hooks[name].append(getattr(callback, name))
    for name, functions in keywords.items():
        if name not in HOOKS:
            known = (*HOOKS, *arguments)
            hint = (
                _hint(name)
                or suggest(name, known)
                or f" Hooks are {', '.join(HOOKS)}; other arguments {', '.join(arguments)}."
            )
            raise ConfigError(f"Trainer: unexpected argument {name!r}.{hint}", "not-a-choice")
        for function in functions if isinstance(functions, (list, tuple)) else [functions]:
            if not callable(function):
                raise ConfigError(f"{name}: expected a function of the trainer, got {function!r}.", "wrong-type")
            hooks[name].append(function)
    return hooks


def _hint(name: str) -> str:
    """Return what to give instead of an argument of another trainer, or of an option."""
    if name in OTHER_NAMES:
        return f" Use {OTHER_NAMES[name]}."
    if name in {*aliases(), *(f.name for f in option_fields(Config))}:
        return f" It is an option: set it in the config, or with load_config(..., {name}=...)."
    return ""


def _methods(callback: Any) -> list[str]:
    """Return the names of the hooks that an object defines. Raise ConfigError for a method that is not a hook."""
    if isinstance(callback, type):
        name = callback.__name__
        raise ConfigError(
            f"callbacks: expected an object, got the class {name}. Call it first: {name}().", "wrong-type"
        )
    names = [name for name in dir(callback) if name.startswith("on_") and callable(getattr(callback, name))]
    class_name = type(callback).__name__
    for name in names:
        if name not in HOOKS:
            hint = suggest(name, HOOKS) or f" Hooks are {', '.join(HOOKS)}."
            raise ConfigError(f"callbacks: {class_name}.{name} is not a hook.{hint}", "usage")
    if not names:
        example = " Pass a function as on_step_end=..." if callable(callback) else ""
        raise ConfigError(f"callbacks: {class_name} has none of the methods {', '.join(HOOKS)}.{example}", "wrong-type")
    return names
