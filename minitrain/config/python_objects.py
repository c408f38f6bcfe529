"""Objects passed to `Trainer` in Python, and the string that identifies each of them in a config.

The identifier describes the object and has a hash of its content. It appears in config.yml and in the model card, and a
run resumes only with an equal object.
"""

import weakref
from dataclasses import dataclass
from typing import Any

PREFIX = "<python: "
_objects: "weakref.WeakValueDictionary[str, PythonObject]" = weakref.WeakValueDictionary()


@dataclass(eq=False)
class PythonObject:
    """An object and its identifier. `find_object` finds it as long as a reference to this instance exists.

    Attributes:
        argument: The argument that received it, such as `train_dataset`.
    """

    value: Any
    argument: str
    identifier: str

    def __post_init__(self):
        _objects[self.identifier] = self


def python_object(value: Any, argument: str, description: str) -> PythonObject:
    """Register an object for `find_object`."""
    return PythonObject(value, argument, f"{PREFIX}{description}>")


def find_object(identifier: str | None) -> PythonObject | None:
    """Return the object with this identifier, or None if this process has none."""
    return _objects.get(identifier) if identifier is not None else None


def is_lost(value: str | None) -> bool:
    """Return whether a value identifies an object of another process, as in the config.yml of a run."""
    return value is not None and value.startswith(PREFIX) and find_object(value) is None
