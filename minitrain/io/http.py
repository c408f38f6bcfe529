"""Request JSON over HTTP with the standard library, within a time limit."""

import contextlib
import http.client
import json
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any
from urllib.parse import urlsplit

LONGEST_WAIT = 0.5  # seconds until `on_wait` is called again


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


def call_json(
    url: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
    seconds: float = 60.0,
    on_wait: Callable[[], None] = lambda: None,
) -> Any:
    """Return the JSON that a server answers to a POST of `body`, or to a GET without it.

    Args:
        url: The address.
        body: What is sent as JSON.
        headers: Headers of the request.
        seconds: The time limit.
        on_wait: Called at least each `LONGEST_WAIT` seconds until the answer begins. An exception that it raises closes
            the connection, so that the server drops the request.

    Raises:
        HTTPError: The server cannot be reached, is too slow, answers with an error, or not with JSON.
    """
    data = None if body is None else json.dumps(body).encode()
    deadline, content = time.monotonic() + seconds, b""
    try:
        with contextlib.closing(_connect(url, seconds)) as connection:
            path = urlsplit(url)._replace(scheme="", netloc="", fragment="").geturl() or "/"
            connection.request(
                "GET" if data is None else "POST", path, data, {"Content-Type": "application/json"} | (headers or {})
            )
            _wait(connection, deadline, on_wait)
            response = connection.getresponse()
            if not 200 <= response.status < 300:
                raise _status_error(response)
            while part := response.read1(1 << 20):
                content += part
                if time.monotonic() > deadline:  # the timeout of a socket is for each part
                    raise TimeoutError
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
        return json.loads(content) if content.strip() else None
    except (OSError, http.client.HTTPException) as error:
        slow = isinstance(error, TimeoutError)
        raise HTTPError("slow" if slow else "unreached", str(error) or type(error).__name__) from None
    except ValueError:
        raise HTTPError("not-json", content[:60].decode(errors="replace")) from None


def _connect(url: str, seconds: float) -> http.client.HTTPConnection:
    """Return a connection to a server, without a proxy: servers are near."""
    address = urlsplit(url)
    connection = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    return connection(address.netloc, timeout=seconds)


def _wait(connection: http.client.HTTPConnection, deadline: float, on_wait: Callable[[], None]) -> None:
    """Return when the answer begins. Raise TimeoutError at the deadline."""
    while True:
        on_wait()
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        if wait([connection.sock], min(remaining, LONGEST_WAIT)):
            return


def _status_error(response: http.client.HTTPResponse) -> HTTPError:
    text = ""
    with contextlib.suppress(OSError, http.client.HTTPException):
        text = response.read(2000).decode(errors="replace").strip()
    return HTTPError("status", text, response.status)
