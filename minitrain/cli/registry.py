"""The registry of commands. The parser, the help, docs/commands.md and the tests are derived from it."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command of the command line.

    Attributes:
        name: Its name on the command line.
        summary: One sentence in lower case, without a period.
        usage: The arguments, as the first line of the help shows them.
        example: A command line that `docs/commands.md` shows.
        docs: The page under docs/, and the heading, that explain the command; empty if the help is enough.
        add_arguments: Adds the arguments to a parser.
        run: Runs the command and returns its exit code.
        aliases: Other names.
    """

    name: str
    summary: str
    usage: str
    example: str
    docs: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    aliases: tuple[str, ...]

    @property
    def takes_config(self) -> bool:
        """Return whether its first argument is a config, which `--config` can name, too."""
        return "CONFIG.yml" in self.usage


COMMANDS: dict[str, Command] = {}


def command(
    add_arguments: Callable[[argparse.ArgumentParser], None],
    summary: str,
    *,
    usage: str,
    example: str,
    docs: str = "",
    aliases: tuple[str, ...] = (),
) -> Callable:
    """Register a function as the command of its name: `cache_teacher` runs `minitrain cache-teacher`."""

    def register(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
        name = run.__name__.replace("_", "-")
        COMMANDS[name] = Command(name, summary, usage, example, docs, add_arguments, run, aliases)
        return run

    return register


def find_command(name: str) -> Command | None:
    """Return the command of this name or alias."""
    return next((one for one in COMMANDS.values() if name == one.name or name in one.aliases), None)
