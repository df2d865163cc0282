"""Servers that never end, drip, lie or break off: one bounded request, and one line about it."""

import contextlib
import gzip
import http.client
import itertools
import json
import re
import socket
import threading
import time

import pytest
from time_limit import at_most

from zeda_megatron.config.generate import SamplingConfig
from zeda_megatron.errors import UserError
from zeda_megatron.evaluation.answering.engine import Request
from zeda_megatron.evaluation.answering.openai_engine import OpenAIEngine
from zeda_megatron.runtime.fetch import Refused, fetch

OK = b"HTTP/1.1 200 OK\r\n"
SAID = json.dumps({"choices": [{"message": {"content": "4"}, "finish_reason": "stop"}]}).encode()


class Server:
    """Sends what it is given to everybody who asks, piece by piece; hears what it was asked."""

    def __init__(self, pieces, pause: float = 0.0):
        self.pieces, self.pause, self.heard = pieces, pause, []
        self.listening = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listening.getsockname()[1]}/v1"

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listening.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection) -> None:
        with connection, contextlib.suppress(OSError):
            heard = connection.recv(1 << 16)
            length = re.search(rb"Content-Length: (\d+)", heard)
            while length and len(heard.partition(b"\r\n\r\n")[2]) < int(
                length[1]
            ):  # what is unread at the end is a reset
                heard += connection.recv(1 << 16)
            self.heard.append(heard)
            for piece in self.pieces():
                connection.sendall(piece)
                time.sleep(self.pause)

    def close(self) -> None:
        self.listening.close()


def once(*pieces):
    return lambda: iter(pieces)


def endless(head: bytes, piece: bytes):
    return lambda: itertools.chain([head], itertools.repeat(piece))


BIG = 1 << 20
NEVER = {
    "a body without end": (endless(OK + b"\r\n", b"x" * 65536), 0),
    "a body of spaces": (endless(OK + b"\r\n", b" " * 65536), 0),
    "a chunked body without end": (
        endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 65536 + b"\r\n"),
        0,
    ),
    "chunks that drip": (endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"), 0.05),
    "a body that drips": (endless(OK + b"\r\n", b"x"), 0.05),
    "a body that drips to its length": (endless(OK + b"Content-Length: 900000\r\n\r\n", b"x"), 0.05),
    "a head that drips": (endless(OK + b"X: ", b"x"), 0.05),
    "a first line that drips": (endless(b"HTTP/1.1 200 ", b"O"), 0.05),
    "heads without end": (endless(OK, b"X: y\r\n"), 0),
    "a head of a long line": (endless(OK + b"X: ", b"x" * 65536), 0),
    "Continue for ever": (endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), 0.01),
    "Continue that drips": (endless(b"HTTP/1.1 100 Continue\r\n\r\n", b"X: y\r\n"), 0.05),
    "a refusal without end": (endless(b"HTTP/1.1 400 Bad\r\n\r\n", b"x" * 65536), 0),
    "a refusal that drips": (endless(b"HTTP/1.1 400 Bad\r\n\r\n", b"x"), 0.05),
    "busy for ever, dripping": (endless(b"HTTP/1.1 503 Busy\r\n\r\n", b"x"), 0.05),
    "nothing": (endless(b"", b""), 0.05),
}
BROKEN = {
    "no HTTP": once(b"SSH-2.0-OpenSSH_9.9\r\n"),
    "only a body": once(SAID),
    "closed at once": once(b""),
    "half a head": once(OK + b"Content-Le"),
    "a body cut off": once(OK + b"Content-Length: 1000\r\n\r\n" + SAID),
    "chunks cut off": once(OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"),
    "a chunk of no size": once(OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\nab\r\n"),
    "a chunk of a size below zero": once(OK + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nab\r\n"),
    "a chunk of a long size": once(OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 5000 + b"\r\nab\r\n"),
    "a length of no number": once(OK + b"Content-Length: many\r\n\r\n{}x"),
    "a length below zero": once(OK + b"Content-Length: -1\r\n\r\n{}x"),
    "a long length": once(OK + b"Content-Length: " + b"9" * 20 + b"\r\n\r\n" + SAID),
    "status of no number": once(b"HTTP/1.1 abc OK\r\n\r\n" + SAID),
    "status 999": once(b"HTTP/1.1 999 What\r\n\r\n" + SAID),
    "status 204": once(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "status 304": once(b"HTTP/1.1 304 Not Modified\r\n\r\n"),
    "status 300 without a place": once(b"HTTP/1.1 300 Multiple\r\n\r\n"),
    "a redirect without a place": once(b"HTTP/1.1 302 Found\r\n\r\n"),
    "a redirect to a file": once(b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n"),
    "a redirect in a circle": once(b"HTTP/1.1 307 Again\r\nLocation: /v1/chat/completions\r\n\r\n"),
    "a redirect to two lines": once(b"HTTP/1.1 302 Found\r\nLocation: http://a/\r\n b\r\n\r\n"),
    "asks for a password": once(b'HTTP/1.1 401 No\r\nWWW-Authenticate: Basic realm="x"\r\n\r\n'),
    "a proxy asks": once(b"HTTP/1.1 407 No\r\nProxy-Authenticate: Basic\r\n\r\n"),
    "gzip": once(OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(SAID)),
    "a gzip bomb": once(OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b" " * (300 << 20), 1)),
    "a page": once(OK + b"Content-Type: text/html\r\n\r\n<html>sign in</html>"),
    "events": once(OK + b"Content-Type: text/event-stream\r\n\r\ndata: {}\n\ndata: [DONE]\n\n"),
    "a byte order mark of UTF-8 twice": once(OK + b"\r\n\xef\xbb\xbf\xef\xbb\xbf" + SAID),
    "nested": once(OK + b"\r\n" + b'{"choices": ' + b"[" * 200_000),
    "a million lists": once(OK + b"\r\n" + b'{"choices": [' + b"[]," * 1_000_000 + b"1]}"),
    "a key that is ours": once(b"HTTP/1.1 403 No\r\n\r\nyour key secret\r\n\x1b[2Jis wrong"),
}
"""Each is refused; with what words is the test's business only where they matter."""


@pytest.fixture
def serve(monkeypatch):
    made = []
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("NO_PROXY", "*")

    def start(pieces, pause=0.0) -> Server:
        made.append(Server(pieces, pause))
        return made[-1]

    yield start
    for server in made:
        server.close()


@pytest.mark.parametrize("name", NEVER)
def test_a_server_that_never_ends_is_left(name, serve):
    server = serve(*NEVER[name])
    errors = (Refused, OSError, ValueError, http.client.HTTPException)
    with at_most(60), pytest.raises(errors):
        fetch(server.url, 0.7, BIG)


def ask(server: Server, seconds: float = 5.0):
    engine = OpenAIEngine(server.url, "tiny", timeout=seconds, tries=2)
    return engine.answer(
        [Request([{"role": "user", "content": "2+2?"}], 1, "q 1")], SamplingConfig(max_new_tokens=8)
    )


@pytest.mark.parametrize("name", [*NEVER, *BROKEN])
def test_whatever_a_server_sends_is_told_in_one_line(name, serve, monkeypatch):
    pieces, pause = NEVER[name] if name in NEVER else (BROKEN[name], 0.0)
    server = serve(pieces, pause)
    sleep = time.sleep
    monkeypatch.setattr(
        "zeda_megatron.runtime.openai_server.time",
        type("Clock", (), {"sleep": lambda _: sleep(0.01), "monotonic": time.monotonic}),
    )
    with at_most(120), pytest.raises(UserError, match=server.url) as error:
        ask(server, 0.7 if name in NEVER else 5.0)
    said = str(error.value)
    assert "\n" not in said and len(said) < 500 and "secret" not in said and said.isprintable()
    asked = [heard for heard in server.heard if heard]
    assert (asked or name in NEVER) and len(asked) <= 2  # who is not heard in time is not asked again
    assert all(b"Authorization: Bearer secret" in heard for heard in asked)


def test_a_plain_answer_is_read_whatever_its_form(serve):
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (SAID[:7], SAID[7:], b""))
    for head, body in (
        (b"", SAID),
        (b"Content-Length: %d\r\n" % len(SAID), SAID),
        (b"Transfer-Encoding: chunked\r\n", chunks),
        (b"Content-Type: text/plain; charset=nonsense\r\n", SAID),
        (b"Content-Type: application/json\r\n", SAID.decode().encode("utf-16")),
    ):
        server = serve(once(OK + head + b"\r\n" + body))
        assert ask(server)[0].text == "4"


def test_what_the_counters_of_a_server_say_is_bounded_too(serve):
    for name in ("a body without end", "a first line that drips"):
        server = serve(*NEVER[name])
        with at_most(60):
            engine = OpenAIEngine(server.url, "tiny")
            assert name != "a body without end" or engine.slots() is None
    assert all(b"Authorization" not in heard for heard in server.heard)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@127.0.0.1:9/v1", "http://127.0.0.1:9/v1?key=hunter2", "http://127.0.0.1:9/v1#hunter2",
        "http://127.0.0.1:hunter2/v1", "http://:80/v1", "http://", "http://[::1/v1", "http://a b/v1", "http://a\n/v1",
        "http://h\u00e4/v1", "http://127.0.0.1:99999/v1",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_at_once_and_passwords_are_not_repeated(url):
    with pytest.raises(UserError, match="address") as error:
        OpenAIEngine(url, "tiny")
    assert "@" not in str(error.value) and "key=hunter2" not in str(error.value)
