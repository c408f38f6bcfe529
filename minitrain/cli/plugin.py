"""A user's own file of losses or schemas. Only the command line can name one: a config alone never runs code."""

import importlib.util
import sys
import traceback
from pathlib import Path

from minitrain.errors import ConfigError


def load_plugin(path: str) -> None:
    """Runs a Python file, whose `register_loss` and `schema` decorators add to what configs can name.

    Raises ConfigError, with the line where it is known, for a file that is not there or fails.
    """
    file = Path(path)
    if not file.is_file() or file.suffix != ".py":
        raise ConfigError(f"--plugin: {path} is no Python file that exists.", "not-found")
    name = f"minitrain_plugin_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up their types
    try:
        spec.loader.exec_module(module)
    except ConfigError as error:
        raise error.at(f"--plugin: {path}") from None
    except SyntaxError as error:
        raise ConfigError(f"--plugin: {path}:{error.lineno or 1}: {error.msg}", "plugin-failed") from None
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file.absolute())]
        place = f"{path}:{lines[-1]}" if lines else path
        raise ConfigError(f"--plugin: {place}: {type(error).__name__}: {error}", "plugin-failed") from None
