"""Keep values of environment variables and passwords in URLs out of messages and files.

A config can take a secret, or a path on this machine, from the environment: `${oc.env:NAME}`. Saved configs keep the
reference (config/saved.py). Messages can include the value, for example in a path, so `redact` searches for it.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any

MIN_LENGTH = 6  # of a value to hide; shorter ones occur in ordinary words and numbers
MASK = "***"

_VARIABLE = re.compile(r"""oc\.env\s*:\s*['"]?([^'",{}\s]+)""")
_REFERENCE = r"\$\{[^{}]*\}"
_URL = re.compile(r"[a-z][a-z0-9+.-]*://\S+", re.IGNORECASE)
# A password can have an unescaped slash, but `:` and digits before a slash are a port.
_USER = re.compile(r"(?<=://)([^/?#]+|[^/?#:$]*:(?!\d*[/?#])\S+)@")
_TOKEN = re.compile(
    r"([?&;#][\w.-]*(?:token|key|keyid|secret|passw|password|passwd|pass|pwd|sig|signature|auth|credentials?)=)"
    r"([^&;#\s'\"]+)",
    re.IGNORECASE,
)

_hidden: dict[str, str] = {}  # value -> what is shown instead
_pattern: re.Pattern | None = None


def hide_variables(raw: str) -> bool:
    """Hide the values of the environment variables that an option names. Return whether its value depends on one."""
    names = _VARIABLE.findall(raw)
    for name in names:
        if name in os.environ:
            hide(os.environ[name], f"${{oc.env:{name}}}")
    return any(name in os.environ or "$" in name for name in names)  # $: the name itself has a reference


def hide(value: Any, replacement: str) -> None:
    """Have `redact` show `replacement` instead of a string, or of each string in a list or dict."""
    if isinstance(value, (dict, list)):
        for entry in value.values() if isinstance(value, dict) else value:
            hide(entry, replacement)
    elif isinstance(value, str):
        global _pattern
        _pattern = None
        for form in _forms(value):
            if len(form.strip()) >= MIN_LENGTH:
                _hidden.setdefault(form, replacement)


def redact(text: str) -> str:
    """Return `text` without values from the environment and without passwords in URLs."""
    global _pattern
    if _hidden and _pattern is None:
        values = sorted(map(re.escape, _hidden), key=len, reverse=True)
        _pattern = re.compile(
            "|".join([*values, _REFERENCE])
        )  # references are matched first, so nothing inside them is replaced
    if _pattern is not None:
        text = _pattern.sub(lambda match: _hidden.get(match[0], match[0]), text)
    return redact_urls(text)


def redact_urls(text: str) -> str:
    """Return `text` with user info and tokens of its URLs masked, except `${...}`."""
    return _URL.sub(lambda match: _TOKEN.sub(_masked_token, _USER.sub(_masked_user, match[0], count=1)), text)


def stored_name(name: str) -> str:
    """Return a name in the form for files that are compared later: a hash if it comes from the environment."""
    return name if redact(name) == name else _digest(name)


def is_stored_name(stored: str | None, name: str) -> bool:
    """Return whether `stored` is the `stored_name` of this name, in this or another process."""
    return stored in (name, _digest(name))


def _forms(value: str) -> Iterator[str]:
    """Yield the forms of a value that messages can have: its lines, escaped, or as a normalized path."""
    for line in {value, *value.splitlines()}:
        yield from (line, repr(line)[1:-1], json.dumps(line)[1:-1])
    yield from (os.path.normpath(value), os.path.abspath(value), os.path.realpath(value))


def _masked_user(match: re.Match) -> str:
    return match[0] if re.fullmatch(rf"([^:$]*:)?({_REFERENCE}|:)+", match[1]) else f"{MASK}@"


def _masked_token(match: re.Match) -> str:
    return match[0] if re.fullmatch(_REFERENCE, match[2]) else match[1] + MASK


def _digest(name: str) -> str:
    return f"sha256:{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:32]}"
