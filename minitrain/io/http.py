"""Request JSON over HTTP with the standard library, within a time limit."""

import contextlib
import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # servers are near; proxies are not for them


class HTTPError(Exception):
    """A request without a usable answer.

    Attributes:
        problem: "unreached", "slow", "status" or "not-json".
        text: What happened: a reason, or the beginning of the answer.
        status: The status of an answer that is an error; else 0.
    """

    def __init__(self, problem: str, text: object = "", status: int = 0):
        super().__init__(problem, text, status)
        self.problem, self.text, self.status = problem, str(text), status


def call_json(url: str, body: Any = None, headers: dict[str, str] | None = None, seconds: float = 60.0) -> Any:
    """Return the JSON that a server answers to a POST of `body`, or to a GET without it.

    Raises:
        HTTPError: The server cannot be reached, is too slow, answers with an error, or not with JSON.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"} | (headers or {}))
    deadline, content = time.monotonic() + seconds, b""
    try:
        with _OPENER.open(request, timeout=seconds) as response:
            while part := response.read1(1 << 20):
                content += part
                if time.monotonic() > deadline:  # the timeout of a socket is for each part
                    raise TimeoutError
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
        return json.loads(content) if content.strip() else None
    except urllib.error.HTTPError as error:
        text = ""
        with contextlib.suppress(OSError, http.client.HTTPException):
            text = error.read(2000).decode(errors="replace").strip()
        raise HTTPError("status", text, error.code) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        slow = isinstance(reason, TimeoutError)
        raise HTTPError("slow" if slow else "unreached", reason or type(error).__name__) from None
    except ValueError:
        raise HTTPError("not-json", content[:60].decode(errors="replace")) from None
