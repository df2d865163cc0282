"""One request to a server that nobody has checked: bounded in bytes and in time, and never sent on elsewhere."""

from __future__ import annotations

import http.client
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress

from ..errors import UserError, cut_short

_SAID = 2000
"""Bytes of a refusal that are read."""


class Refused(Exception):
    """The server answered with an error. `code`, `reason`, and the beginning of what it `said`."""

    def __init__(self, code: int, reason: str, said: str):
        super().__init__(f"{code} {reason}")
        self.code, self.reason, self.said = code, reason, said


def fetch(
    url: str, seconds: float, most: int, data: bytes | None = None, headers: dict[str, str] | None = None
) -> bytes:
    """The body of an answer: to a GET, or to a POST of `data`.

    Args:
        seconds: until the answer is complete. A server that sends a byte now and then, in its head or in its body,
            or says `100 Continue` for ever, gets no more.
        most: bytes that the body may have. It is taken as it comes: nothing is unpacked.

    Raises:
        Refused: an HTTP error.
        UserError: a redirect; the question would be asked elsewhere, key and all, or as a GET.
        ValueError: no address, or a body that is too long.
        OSError, http.client.HTTPException: no connection, or no complete answer; `TimeoutError` for none in time.
    """
    with _Deadline(seconds) as deadline:
        opener = urllib.request.build_opener(_NoRedirects, _Http(deadline), _Https(deadline))
        try:
            with opener.open(urllib.request.Request(url, data, headers or {}), timeout=seconds) as response:
                body = response.read(most + 1)
                if not deadline.over and len(body) <= most and response.length:
                    raise http.client.IncompleteRead(body[:0], response.length)
        except urllib.error.HTTPError as error:
            said = b""
            with error, suppress(OSError, ValueError, http.client.HTTPException):
                said = error.read(_SAID)
            deadline.check()
            raise Refused(error.code, str(error.reason), said.decode("utf-8", "replace")) from None
        except (OSError, http.client.HTTPException):
            deadline.check()
            raise
        deadline.check()
    if len(body) > most:
        raise ValueError(f"longer than {most} bytes")
    return body


class _Deadline:
    """Cuts connections when the time is over; a context manager. A timeout of a socket starts anew at every byte."""

    def __init__(self, seconds: float):
        self.seconds, self.ends = seconds, time.monotonic() + seconds
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_) -> None:
        self._timer.cancel()

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.ends

    def check(self) -> None:
        """Raise `TimeoutError` if the time is over."""
        if self.over:
            raise TimeoutError(f"not complete after {self.seconds:.0f} s")

    def watch(self, connection: socket.socket) -> None:
        self._sockets.append(connection)
        if self.over:
            self._cut()

    def _cut(self) -> None:
        for connection in self._sockets:
            with suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _watched(kind: type[http.client.HTTPConnection], deadline: _Deadline) -> type[http.client.HTTPConnection]:
    class Watched(kind):
        def connect(self) -> None:
            super().connect()
            deadline.watch(self.sock)

    return Watched


class _Http(urllib.request.HTTPHandler):
    def __init__(self, deadline: _Deadline):
        super().__init__()
        self.connection = _watched(http.client.HTTPConnection, deadline)

    def http_open(self, req):
        return self.do_open(self.connection, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, deadline: _Deadline):
        super().__init__()
        self.connection = _watched(http.client.HTTPSConnection, deadline)

    def https_open(self, req):
        return self.do_open(self.connection, req)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        raise UserError(
            f"{req.full_url}: redirects ({code}) to {cut_short(newurl, 120)}; if that is right, give that address"
        )
