"""Servers that share questions out among themselves.

Every server has so many questions under way; whoever has ended one takes the next, so that no server waits for
another. A server that is gone leaves its questions to the others.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from ..config.generate import GenerateOptions
from ..errors import UserError
from ..runtime.openai_server import NoAnswer, OpenAIServer, brief
from ..strict_json import is_int

T = TypeVar("T")
FLAGS = ("--rollout-url", "--rollout-model")
_PAUSE = 0.2
"""Seconds between two looks for something to do."""


def open_servers(options: GenerateOptions, length: int, command: str) -> list[OpenAIServer]:
    """The servers of --rollout-url, waited for as long as --rollout-wait says.

    Args:
        length: tokens of the longest prompt and its answer.
        command: what starts such a server.

    Raises:
        UserError: nobody there, several models, or a context that is too short.
    """
    servers, until = [], time.monotonic() + options.rollout_wait
    for url in options.rollout_url:
        while True:
            try:
                server = OpenAIServer(
                    url,
                    options.rollout_model,
                    options.rollout_timeout,
                    tries=options.rollout_tries,
                    flags=FLAGS,
                )
                if options.rollout_model:
                    server.look_up()
                break
            except NoAnswer as error:
                if time.monotonic() >= until:
                    raise UserError(f"{FLAGS[0]} {error}; start it: {command}") from None
                time.sleep(_PAUSE)
        servers.append(server)
    names = sorted({server.model for server in servers})
    if len(names) > 1:
        raise UserError(f"{FLAGS[0]}: these serve different models: {brief(', '.join(names))}")
    for server in servers:
        context = server.listed.get("max_model_len")
        if is_int(context) and context < length:
            raise UserError(
                f"{FLAGS[0]} {server.url}: has a context of {context}, prompt and answer may take {length}: "
                f"{command}, or a smaller --max-new-tokens"
            )
    return servers


class ServerPool:
    """Servers of one model.

    Args:
        parallel: questions under way at each.
        say: gets a line about a server that is gone.

    Attributes:
        all: as they were given. alive: those that are not gone.
    """

    def __init__(self, servers: Sequence[OpenAIServer], parallel: int, say: Callable[[str], None]):
        self.all, self.alive, self.parallel, self.say = servers, list(servers), parallel, say

    def each(self, do: Callable[[OpenAIServer], Any]) -> None:
        """Do something with every server at the same time; who does not answer is gone. `UserError` if none is left."""
        with ThreadPoolExecutor(max(len(self.alive), 1)) as threads:
            asked = [(server, threads.submit(do, server)) for server in self.alive]
        for server, made in asked:
            try:
                made.result()
            except NoAnswer as error:
                if failed := self._gone(server, error):
                    raise failed from None

    def look_again(self) -> None:
        """Take back those that were gone and are there again."""
        for server in self.all:
            if server not in self.alive:
                with suppress(UserError):
                    server.call("/models", tries=1)
                    self.alive = [*self.alive, server]
                    self.say(f"{FLAGS[0]} {server.url}: is back")

    def share_out(self, count: int, one: Callable[[OpenAIServer, int], T]) -> Iterator[list[tuple[int, T]]]:
        """Numbers below `count` and what `one(server, number)` gives for them, as it comes; now and then an empty list,
        so that the caller can look for a signal. Who stops listening leaves what is under way to itself."""
        todo, done, over = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
        for number in range(count):
            todo.put(number)

        def work(server: OpenAIServer) -> None:
            while not over.is_set() and server in self.alive:
                try:
                    number = todo.get(timeout=_PAUSE)
                except queue.Empty:
                    continue  # a server that is going may give one back
                try:
                    done.put((number, one(server, number)))
                except NoAnswer as error:
                    todo.put(number)
                    done.put((server, error))
                except BaseException as error:
                    done.put((None, error))

        # One of each server after the other: few questions are shared out evenly.
        for _ in range(min(self.parallel, count)):
            for server in self.alive:
                threading.Thread(target=work, args=[server], daemon=True).start()
        left = count
        try:
            while left:
                ready, failed = [], None
                for who, what in _waiting(done):
                    if isinstance(what, NoAnswer):
                        failed = self._gone(who, what) or failed
                    elif isinstance(what, BaseException):
                        failed = what
                    else:
                        ready.append((who, what))
                left -= len(ready)
                yield ready  # what has come is kept before anything ends the run
                if failed is not None:
                    raise failed
        finally:
            over.set()

    def _gone(self, server: OpenAIServer, error: NoAnswer) -> UserError | None:
        """Do without a server; an error if it was the last."""
        if server not in self.alive:
            return None  # another of its questions told
        self.alive = [one for one in self.alive if one is not server]
        if not self.alive:
            return UserError(f"{FLAGS[0]} {error}; no server is left, the same command goes on")
        self.say(f"{FLAGS[0]} {error}; {len(self.alive)} servers go on without it")
        return None


def _waiting(done: queue.SimpleQueue) -> Iterator[tuple[Any, Any]]:
    """All that is there, after a wait of a second at most."""
    try:
        yield done.get(timeout=1.0)
        while True:
            yield done.get_nowait()
    except queue.Empty:
        return
