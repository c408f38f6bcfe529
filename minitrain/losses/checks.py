"""Check the name and the options of the loss."""

from dataclasses import fields

from minitrain.config.issues import ConfigIssues, check_types
from minitrain.config.schema import Config, aliases
from minitrain.config.suggest import hint_for_value

from . import registered
from .base import Loss, build_loss


def check(config: Config, issues: ConfigIssues, is_object: bool = False) -> Loss | None:
    """Add to `issues` what is wrong with the options of the loss, and write the checked ones to `config.loss`.

    Args:
        is_object: The loss was given in Python, so its class need not be registered.

    Returns:
        The loss, or None when it cannot be built.
    """
    name, known = config.loss["name"], registered()
    known_name = isinstance(name, str) and name in known
    if not known_name and is_object:
        return None
    if not known_name:
        hint = _of_python_class(str(name)) or hint_for_value("loss.name", name, known)
        issues.add("loss.name", "not-a-choice", f"there is no loss {name!r}; there are {', '.join(known)}.{hint}")
        return None
    written = {key: value for key, value in config.loss.items() if key != "name"}
    for key in [key for key in written if key not in _options_of(known[name])]:
        if others := [other for other, one in known.items() if key in _options_of(one)]:
            have = f"{', '.join(others)} {'has' if len(others) == 1 else 'have'}"
            issues.add(f"loss.{key}", "unknown-option", f"loss.name={name} has no such option; {have} it.")
    options = check_types(known[name].options_class, written, "loss.", issues)
    config.loss = {"name": name} | options
    return build_loss(name, options, written, issues)


def _of_python_class(name: str) -> str:
    """What to do about the name that a run folder has of a loss object whose class is not registered."""
    if "." not in name:
        return ""
    return (
        " It was given in Python as an object of this class. Give it again, Trainer(config, loss=...), or register the "
        "class with register_loss and name its file with --plugin."
    )


def _options_of(loss: type) -> set[str]:
    return {f.name for f in fields(loss.options_class)} | aliases(loss.options_class).keys()
