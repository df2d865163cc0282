"""A model behind a server that speaks OpenAI's chat protocol, such as `vllm serve`."""

from __future__ import annotations

import http.client
import json
import math
import os
import time
import urllib.parse
from pathlib import Path
from typing import Any

from ...config.generate import SamplingConfig
from ...data.tokenizers import load_tokenizer
from ...errors import UserError
from ...strict_json import is_int, is_number, read_json
from .engine import END, THINK, About, Answer, ChatPrompts, Origin, Request
from .fetch import Refused, fetch
from .transformers_engine import extra_costs

_PASSING = (408, 409, 429, 500, 502, 503, 504)
_ENDED = (None, "stop", "tool_calls", "function_call")
"""Reasons to finish that leave an answer whole; `length`, `abort`, `content_filter` and the like cut it off."""
_THOUGHTS = ("reasoning_content", "reasoning")
_MOST, _MOST_PER_TOKEN = 4 << 20, 256
"""Bytes that a server's reply may have: so many, and so many for each token asked for."""
_ZERO, _ROUTED = "zeda:zero_slots_total", "zeda:routed_slots_total"
"""Counters of this project's vLLM plugin."""


class OpenAIEngine:
    """Asks a server, several questions at a time. Each answer's seed goes with it; whether it counts is the server's.

    Args:
        url: address up to and including `/v1`. Redirects are refused: the key goes to this address only.
        model: the name that the server knows; None: the only one it has.
        parallel: questions under way at a time.
        config_folder: folder with the model's config.json, for FLOP counts; with its tokenizer and chat template, if it
            has them, prompts are known, and with them whether an answer begins inside the thinking.
        timeout: seconds to wait for one answer.
        key_variable: environment variable that holds the server's key, if it wants one.
        tries: attempts at one answer while the server is busy or gone; the pauses grow to 30 seconds.
        template_args: variables for the server's chat template (`chat_template_kwargs`).
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        parallel: int = 8,
        config_folder: str | None = None,
        timeout: float = 3600.0,
        key_variable: str = "OPENAI_API_KEY",
        tries: int = 6,
        template_args: dict[str, Any] | None = None,
    ):
        self.url, self.timeout, self.tries = url.rstrip("/"), timeout, tries
        self.group, self.parallel = 1, parallel
        _require_address(self.url)
        self._key = (os.environ.get(key_variable) or "").strip()
        if not (self._key.isascii() and (self._key.isprintable() or not self._key)):
            raise UserError(f"{key_variable} holds characters that no key has")
        self.model = model or self._only_model()
        self.template_args = template_args or {}
        self.prompts = _prompts(config_folder, self.template_args) if config_folder else None
        config = read_json(Path(config_folder) / "config.json") if config_folder else None
        costs = extra_costs(config) if config else (0.0, 0.0)
        settings = {"template_args": self.template_args} if self.template_args else {}
        known = {"prompts": self.prompts.digest} if self.prompts else {}
        name, origin = f"served as {self.model}", Origin.of_config(config)
        self.about = About(self.url, config, name, *costs, settings, origin, **known)

    def _only_model(self) -> str:
        listed = self._call("/models", None).get("data")
        names = [one.get("id") for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
        if len(names) != 1 or not isinstance(names[0], str):
            raise UserError(
                f"--model {self.url}: serves {len(names)} models ({_brief(', '.join(map(str, names)))}); give one with "
                "--served-model"
            )
        return names[0]

    def answer(self, requests: list[Request], sampling: SamplingConfig) -> list[Answer]:
        return [self._one(request, sampling) for request in requests]

    def _one(self, request: Request, sampling: SamplingConfig) -> Answer:
        order: dict[str, Any] = {
            "model": self.model,
            "messages": request.messages,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": (sampling.seed * 1_000_003 + request.stream) % 2**31,
        }
        if sampling.top_k:
            order["top_k"] = sampling.top_k  # not OpenAI's, but every open server's
        if self.template_args:
            order["chat_template_kwargs"] = self.template_args
        got = self._call("/chat/completions", order, _MOST + _MOST_PER_TOKEN * sampling.max_new_tokens)
        choices, where = got.get("choices"), f"{self.url}: its answer to {request.name}"
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(message, dict):
            raise UserError(f"{where} has no message")
        content, thought = (_text(message, names, where) for names in (("content",), _THOUGHTS))
        reason = choice.get("finish_reason")
        if reason is not None and not isinstance(reason, str):
            raise UserError(f"{where}: finish_reason is no text but {type(reason).__name__}")
        finish = "stop" if reason in _ENDED else "length"
        usage = got.get("usage") or {}
        if not isinstance(usage, dict):
            raise UserError(f"{where}: usage is no object")
        share = usage.get("zero_share")
        if share is not None and not (is_number(share) and 0 <= share <= 1):
            raise UserError(f"{where}: usage.zero_share is no share: {_brief(share)}")
        made, fed = (_count(usage, name, where) for name in ("completion_tokens", "prompt_tokens"))
        return Answer(self._whole(request, content, thought, finish), made, fed, finish, share)

    def _whole(self, request: Request, content: str, thought: str, finish: str) -> str:
        """Thinking and answer as the model wrote them.

        A cut-off text without marks may be thinking that the prompt opened. Where the prompt is not known (no
        --config-folder with a chat template), it is taken for that: no answer is better than half a thought.
        """
        if thought:
            return f"{THINK}{thought}{END if content or finish == 'stop' else ''}{content}"
        if END in content:
            opened = False
        elif self.prompts is not None:
            opened = self.prompts.opened(request.messages)
        else:
            opened = finish == "length"
        return f"{THINK}{content}" if opened and not content.lstrip().startswith(THINK) else content

    def slots(self) -> tuple[int, int] | None:
        """Counters of the vLLM plugin, from the server's /metrics; all of its traffic counts. (0, 0) while there are
        none: a fresh server has none before its first answer."""
        try:
            text = fetch(f"{self.url.removesuffix('/v1')}/metrics", 30.0, 4 * _MOST)
            lines = text.decode("utf-8", "replace").splitlines()
            sums = [
                math.fsum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))
                for name in (_ZERO, _ROUTED)
            ]
            return int(sums[0]), int(sums[1])
        except (UserError, OSError, ValueError, IndexError, OverflowError, http.client.HTTPException):
            return None

    def _call(self, path: str, order: dict | None, most: int = _MOST) -> dict:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if order is None else json.dumps(order).encode()
        begun = time.monotonic()
        for attempt in range(1, self.tries + 1):
            last = attempt == self.tries
            try:
                said = json.loads(fetch(self.url + path, self.timeout, most, data, headers))
                if isinstance(said, dict):
                    return said
                raise UserError(f"{self.url}{path}: its answer is no JSON object")
            except Refused as error:
                if error.code not in _PASSING or last:
                    reason = f"{error.code} {_brief(error.reason)}: {self._without_key(error.said)}"
                    raise UserError(f"{self.url}{path}: {reason}") from None
            except (ValueError, RecursionError) as error:
                reason = self._without_key(str(error))
                raise UserError(
                    f"{self.url}{path}: no address, or its answer is no JSON ({_brief(reason)})"
                ) from None
            except (OSError, http.client.HTTPException) as error:
                if last or time.monotonic() - begun >= self.timeout:
                    reason = _brief(getattr(error, "reason", error)) or type(error).__name__
                    raise UserError(
                        f"{self.url}{path}: no answer ({self._without_key(reason)}); the same command goes on"
                    ) from None
            time.sleep(min(30.0, 1.5**attempt))
        raise AssertionError("unreachable")

    def _without_key(self, text: str) -> str:
        """What is said of a failure: a server may repeat our key."""
        return _brief(text.replace(self._key, "***") if self._key else text, 300)


def _require_address(url: str) -> None:
    """Raise a `UserError` unless it is an address that may be written down: it stands in the run's files."""
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--model {url}: an address begins with http:// or https://")
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
        raise UserError("--model: an address has no password, ? or # in it; keys come from OPENAI_API_KEY")
    if not right:
        raise UserError(f"--model {url}: is no address (http://host:port/v1)")


def _prompts(folder: str, template_args: dict[str, Any]) -> ChatPrompts | None:
    if not (Path(folder) / "tokenizer_config.json").is_file():
        return None
    tokenizer = load_tokenizer(folder, "hf", template_args=template_args)
    return ChatPrompts(tokenizer) if getattr(tokenizer.hf, "chat_template", None) else None


def _text(message: dict, names: tuple[str, ...], where: str) -> str:
    """The first of these that is there, as text that every file can hold."""
    value = next((message[name] for name in names if message.get(name)), "")
    if not isinstance(value, str):
        raise UserError(f"{where}: {names[0]} is no text but {type(value).__name__}")
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _count(usage: dict, name: str, where: str) -> int:
    value = usage.get(name)
    if value is None:
        return 0
    if not is_int(value) or not 0 <= value < 1 << 31:
        raise UserError(f"{where}: usage.{name} is no count: {_brief(value)}")
    return value


def _brief(value: Any, most: int = 120) -> str:
    """On one line, cut."""
    try:
        text = " ".join(str(value).split())
    except ValueError:  # a number of thousands of digits
        text = type(value).__name__
    text = "".join(c if c.isprintable() else "?" for c in text[: most + 1])
    return text if len(text) <= most else f"{text[: most - 3]}..."
