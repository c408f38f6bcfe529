"""Failpoints, for tests of fault tolerance. They do nothing unless MINITRAIN_FAULT is set.

    MINITRAIN_FAULT=point@count:action[#rank],...    save.rename@2:kill9#1

means: kill the process when rank 1 (every rank, without #) reaches the point `save.rename` for the second time.
Points are the calls of `failpoint`. Actions: kill9, term, raise, pause (1 s), sleep (an hour), enospc, flip (a byte of
the file), nan.
"""

import errno
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any


def failpoint(point: str, subject: Any = None) -> Any:
    """Return `subject` (a file or a tensor), changed by the fault if one is set here."""
    return subject


def _armed(point: str, subject: Any = None) -> Any:
    _seen[point] += 1
    action = _plan.get((point, _seen[point]))
    return subject if action is None else _ACTIONS[action](subject)


def _parse(text: str) -> dict[tuple[str, int], str]:
    plan = {}
    for entry in text.split(","):
        point, _, action = entry.partition(":")
        action, _, rank = action.partition("#")
        point, _, count = point.partition("@")
        if rank in ("", os.environ.get("RANK", "0")):
            plan[point, int(count or 1)] = action
    return plan


def _raise(subject: Any) -> None:
    raise RuntimeError("fault: raised on purpose")


def _disk_full(subject: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _flip(file: Path) -> Path:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file


_ACTIONS = {
    "kill9": lambda subject: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda subject: os.kill(os.getpid(), signal.SIGTERM) or subject,
    "raise": _raise,
    "pause": lambda subject: time.sleep(1) or subject,
    "sleep": lambda subject: time.sleep(3600),
    "enospc": _disk_full,
    "flip": _flip,
    "nan": lambda subject: subject * float("nan"),
}
_seen: Counter[str] = Counter()
# Not in a process that torchrun has restarted, so that tests see it recover.
if "MINITRAIN_FAULT" in os.environ and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
    _plan = _parse(os.environ["MINITRAIN_FAULT"])
    failpoint = _armed
