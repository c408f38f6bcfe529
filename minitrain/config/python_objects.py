"""Objects that are given in Python, and the text that stands for each of them in a config.

The text says what the object is and has a hash of its content. So config.yml and the model card name it, and a run is
resumed only with an equal one.
"""

import weakref
from dataclasses import dataclass
from typing import Any

PREFIX = "<python: "
_objects: "weakref.WeakValueDictionary[str, PythonObject]" = weakref.WeakValueDictionary()


@dataclass(eq=False)
class PythonObject:
    """An object and its text. It can be found by the text as long as somebody keeps this.

    Attributes:
        argument: The argument that it was given as, such as `train_dataset`.
    """

    value: Any
    argument: str
    text: str

    def __post_init__(self):
        _objects[self.text] = self


def python_object(value: Any, argument: str, description: str) -> PythonObject:
    """Return an object with its text, from now on known to `find_object`."""
    return PythonObject(value, argument, f"{PREFIX}{description}>")


def find_object(text: str | None) -> PythonObject | None:
    """Return the object that a text stands for, if there is one in this process."""
    return _objects.get(text) if text is not None else None


def is_lost(text: str | None) -> bool:
    """Return whether a text stands for an object of another process, as in the config.yml of a run."""
    return text is not None and text.startswith(PREFIX) and find_object(text) is None
