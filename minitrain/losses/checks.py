"""Checks of the `loss` section of a config."""

from dataclasses import fields

from minitrain.config.issues import ConfigIssues, check_types
from minitrain.config.schema import Config, aliases
from minitrain.config.suggest import hint_for_value

from . import registered
from .base import Loss, build_loss


def check(config: Config, issues: ConfigIssues, is_object: bool = False) -> Loss | None:
    """Add the problems of the loss's options to `issues`, and write the checked options to `config.loss`.

    Args:
        is_object: Whether the loss was passed in Python, so that its class need not be registered.

    Returns:
        The loss, or None if it cannot be built.
    """
    name, known = config.loss["name"], registered()
    known_name = isinstance(name, str) and name in known
    if not known_name and is_object:
        return None
    if not known_name:
        hint = _hint_for_class_name(str(name)) or hint_for_value("loss.name", name, known)
        issues.add("loss.name", "not-a-choice", f"unknown loss {name!r}. Use one of {', '.join(known)}.{hint}")
        return None
    written = {key: value for key, value in config.loss.items() if key != "name"}
    for key in [key for key in written if key not in _options_of(known[name])]:
        if others := [other for other, one in known.items() if key in _options_of(one)]:
            message = f"is not an option of loss.name={name}. Remove it, or set loss.name={' or '.join(others)}."
            issues.add(f"loss.{key}", "unknown-option", message)
    options = check_types(known[name].options_class, written, "loss.", issues)
    config.loss = {"name": name} | options
    loss = build_loss(name, options, written, issues)
    if loss is not None:
        loss.set_online(config)
    return loss


def _hint_for_class_name(name: str) -> str:
    """Return what to do about the name that a run directory has for a loss object of an unregistered class."""
    if "." not in name:
        return ""
    return (
        " It was passed in Python as an object of this class. Pass it again, Trainer(config, loss=...), or "
        "register the class with register_loss and load its file with --plugin."
    )


def _options_of(loss: type) -> set[str]:
    return {f.name for f in fields(loss.options_class)} | aliases(loss.options_class).keys()
