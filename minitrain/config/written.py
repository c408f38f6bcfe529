"""Which options a user wrote, so that one without an effect is refused also where it is written at its default."""

import re
from collections.abc import Set
from typing import Any

from .schema import Config, option_fields

SHARE_OF_A_RUN = 0.7  # nobody writes so many, and the runs of older versions lack the newest ones


def written_options(raw: dict, overridden: Set[str]) -> set[str]:
    """Return the names of the options that ask for something.

    One that is written as off (false, 0, null, empty) does not, nor does a section in which an option is off, nor
    `${...}`, which may stand for either. The config.yml of a run lists all options with their defaults, so of a file
    with more than `SHARE_OF_A_RUN` of them only the overrides count.

    Args:
        raw: The options as they are written, overrides included.
        overridden: Keys of the overrides.
    """
    if len(raw) > SHARE_OF_A_RUN * len(option_fields(Config)):
        sections = {re.split(r"[.\[]", key)[0] for key in overridden}
        raw = {name: value for name, value in raw.items() if name in sections}
    return {name for name, value in raw.items() if _asks(value)}


def _asks(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(map(_asks, value.values()))
    return bool(value) and not (isinstance(value, str) and "${" in value)
