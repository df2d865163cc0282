"""A server that speaks OpenAI's protocol, such as `vllm serve`: its address, its key, its patience."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.parse
from typing import Any

from ..errors import UserError
from ..strict_json import is_int, is_number
from .fetch import Refused, fetch

_PASSING = (408, 409, 429, 500, 502, 503, 504)
_ENDED = (None, "stop", "tool_calls", "function_call")
"""Reasons to finish that leave an answer whole; `length`, `abort`, `content_filter` and the like cut it off."""
_MOST, _MOST_PER_TOKEN = 4 << 20, 256
"""Bytes that a server's reply may have: so many, and so many for each token asked for."""

THINK, END = "<think>", "</think>"
_THOUGHTS = ("reasoning_content", "reasoning")


class NoAnswer(UserError):
    """Nobody answered, for as long as we had patience; somebody else may."""


class OpenAIServer:
    """One server. Redirects are refused: the key goes to this address only.

    Args:
        url: address up to and including `/v1`.
        model: the name that the server knows; None: the only one it has.
        timeout: seconds to wait for one answer.
        key_variable: environment variable that holds the server's key, if it wants one.
        tries: attempts at one answer while the server is busy or gone; the pauses grow to 30 seconds.
        flags: those that gave address and model, for error messages.

    Attributes:
        root: address of what is not OpenAI's.
        listed: what the server says of its model; empty before `look_up` if the name was given.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        timeout: float = 3600.0,
        key_variable: str = "OPENAI_API_KEY",
        tries: int = 6,
        flags: tuple[str, str] = ("--model", "--served-model"),
    ):
        self.url, self.timeout, self.tries, self.flags = url.rstrip("/"), timeout, tries, flags
        self.root = self.url.removesuffix("/v1")
        _require_address(self.url, flags[0])
        self._key = (os.environ.get(key_variable) or "").strip()
        if not (self._key.isascii() and (self._key.isprintable() or not self._key)):
            raise UserError(f"{key_variable} holds characters that no key has")
        self.listed: dict[str, Any] = {}
        self.model = model or self._only_model()

    def _models(self) -> list[dict[str, Any]]:
        listed = self.call("/models").get("data")
        return [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []

    def look_up(self) -> None:
        """Learn what the server says of a model that was given by name, if it lists models. Raises `NoAnswer` if nobody
        is there."""
        try:
            named = [one for one in self._models() if one.get("id") == self.model]
        except NoAnswer:
            raise
        except UserError:
            named = []  # it lists none
        self.listed = named[0] if named else {}

    def _only_model(self) -> str:
        found = self._models()
        names = [one.get("id") for one in found]
        if len(names) != 1 or not isinstance(names[0], str):
            raise UserError(
                f"{self.flags[0]} {self.url}: serves {len(names)} models ({brief(', '.join(map(str, names)))}); give "
                f"one with {self.flags[1]}"
            )
        self.listed = found[0]
        return names[0]

    def ask(self, path: str, order: dict, most_tokens: int, base: str | None = None) -> dict:
        """Ask this server's model for an answer of so many tokens at most."""
        return self.call(path, {"model": self.model, **order}, _MOST + _MOST_PER_TOKEN * most_tokens, base)

    def call(
        self,
        path: str,
        order: dict | None = None,
        most: int = _MOST,
        base: str | None = None,
        tries: int | None = None,
    ) -> dict:
        """The JSON object that a GET gives, or a POST of `order`, to a path below `base` (default: /v1).

        Raises:
            NoAnswer: none in time, or the server was busy or gone every time.
            UserError: a refusal, a redirect, or an answer that is not a JSON object.
        """
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if order is None else json.dumps(order).encode()
        begun, address, tries = time.monotonic(), (base or self.url) + path, tries or self.tries
        for attempt in range(1, tries + 1):
            last = attempt == tries
            try:
                said = json.loads(fetch(address, self.timeout, most, data, headers))
                if isinstance(said, dict):
                    return said
                raise UserError(f"{address}: its answer is not a JSON object")
            except Refused as error:
                if error.code not in _PASSING or last:
                    reason = f"{error.code} {brief(error.reason)}: {self._without_key(error.said)}"
                    kind = NoAnswer if error.code in _PASSING else UserError
                    raise kind(f"{address}: {reason}") from None
            except (ValueError, RecursionError) as error:
                reason = self._without_key(str(error))
                raise UserError(
                    f"{address}: no address, or its answer is not JSON ({brief(reason)})"
                ) from None
            except (OSError, http.client.HTTPException) as error:
                if last or time.monotonic() - begun >= self.timeout:
                    reason = brief(getattr(error, "reason", error)) or type(error).__name__
                    raise NoAnswer(
                        f"{address}: no answer ({self._without_key(reason)}); the same command goes on"
                    ) from None
            time.sleep(min(30.0, 1.5**attempt))
        raise AssertionError("unreachable")

    def _without_key(self, text: str) -> str:
        """What is said of a failure: a server may repeat our key."""
        return brief(text.replace(self._key, "***") if self._key else text, 300)


def choice_of(said: dict, where: str) -> tuple[dict, str]:
    """The first choice of a reply, and why it ended: `stop` or `length`. `where` opens the error message."""
    choices = said.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise UserError(f"{where} has no choice")
    reason = choice.get("finish_reason")
    if reason is not None and not isinstance(reason, str):
        raise UserError(f"{where}: finish_reason is no text but {type(reason).__name__}")
    return choice, "stop" if reason in _ENDED else "length"


def chat_text(choice: dict, finish: str, where: str) -> tuple[str, bool]:
    """What a chat's reply says, as the model wrote it, and whether the server told its thinking apart."""
    message = choice.get("message")
    if not isinstance(message, dict):
        raise UserError(f"{where} has no message")
    content, thought = text_of(where, message, "content"), text_of(where, message, *_THOUGHTS)
    if not thought:
        return content, False
    return f"{THINK}{thought}{END if content or finish == 'stop' else ''}{content}", True


def usage_of(said: dict, where: str) -> dict[str, Any]:
    """What a reply says of its cost, with counts `prompt_tokens` and `completion_tokens` (0 where it says nothing) and
    `zero_share` (or None)."""
    usage = said.get("usage") or {}
    if not isinstance(usage, dict):
        raise UserError(f"{where}: usage is not an object")
    counts = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    for name, value in counts.items():
        if value is not None and not (is_int(value) and 0 <= value < 1 << 31):
            raise UserError(f"{where}: usage.{name} is not a count: {brief(value)}")
    share = usage.get("zero_share")
    if share is not None and not (is_number(share) and 0 <= share <= 1):
        raise UserError(f"{where}: usage.zero_share is not a share: {brief(share)}")
    return {name: value or 0 for name, value in counts.items()} | {"zero_share": share}


def text_of(where: str, parts: dict, *names: str) -> str:
    """The first of these parts of a reply that is there, as text that every file can hold; "" without any."""
    value = next((parts[name] for name in names if parts.get(name)), "")
    if not isinstance(value, str):
        raise UserError(f"{where}: {names[0]} is no text but {type(value).__name__}")
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def brief(value: Any, most: int = 120) -> str:
    """On one line, cut."""
    try:
        text = " ".join(str(value).split())
    except ValueError:  # a number of thousands of digits
        text = type(value).__name__
    text = "".join(c if c.isprintable() else "?" for c in text[: most + 1])
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _require_address(url: str, flag: str) -> None:
    """Raise a `UserError` unless it is an address that may be written down: it stands in the run's files."""
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{flag} {url}: an address begins with http:// or https://")
    try:
        parts = urllib.parse.urlsplit(url)
        right = (
            bool(parts.hostname)
            and parts.port != 0
            and url.isascii()
            and url.isprintable()
            and " " not in url
        )
    except ValueError:
        right, parts = False, None
    if parts is not None and (parts.username is not None or parts.query or parts.fragment):
        raise UserError(f"{flag}: an address has no password, ? or # in it; keys come from OPENAI_API_KEY")
    if not right:
        raise UserError(f"{flag} {url}: is not an address (http://host:port/v1)")
