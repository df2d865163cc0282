"""A model behind a server that speaks OpenAI's chat protocol, such as `vllm serve`."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from ...distill.sampling import SamplingConfig
from ...errors import UserError
from ...strict_json import read_json
from .engine import About, Answer, Request
from .transformers_engine import head_flops

_PASSING = (408, 409, 429, 500, 502, 503, 504)
_ZERO, _ROUTED = "zeda:zero_slots_total", "zeda:routed_slots_total"
"""Counters of this project's vLLM plugin."""


class OpenAIEngine:
    """Asks a server, several questions at a time. Each answer's seed goes with it; whether it counts is the server's.

    Args:
        url: address up to and including `/v1`.
        model: the name that the server knows; None: the only one it has.
        parallel: questions under way at a time.
        config_folder: folder with the model's config.json, for FLOP counts.
        timeout: seconds to wait for one answer.
        key_variable: environment variable that holds the server's key, if it wants one.
        tries: attempts at one answer while the server is busy or gone; the pauses grow to 30 seconds.
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
    ):
        self.url, self.timeout, self.tries = url.rstrip("/"), timeout, tries
        self.group, self.parallel = 1, parallel
        self._key = os.environ.get(key_variable)
        self.model = model or self._only_model()
        config = read_json(Path(config_folder) / "config.json") if config_folder else None
        heads = head_flops(config) if config else 0.0
        self.about = About(self.url, config, f"served as {self.model}", heads)

    def _only_model(self) -> str:
        names = [one.get("id") for one in self._call("/models", None).get("data", [])]
        if len(names) != 1:
            raise UserError(
                f"--model {self.url}: serves {len(names)} models ({', '.join(map(str, names))}); give one with "
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
        got = self._call("/chat/completions", order)
        try:
            choice, usage = got["choices"][0], got.get("usage") or {}
            message = choice["message"]
            thought = message.get("reasoning_content") or message.get("reasoning")
            text = message.get("content") or ""
            text = f"<think>{thought}</think>{text}" if thought else text
            finish = "length" if choice.get("finish_reason") == "length" else "stop"
        except (KeyError, IndexError, TypeError, AttributeError):
            raise UserError(f"{self.url}: its answer to {request.name} has no message") from None
        share = usage.get("zero_share")
        return Answer(
            text,
            int(usage.get("completion_tokens") or 0),
            int(usage.get("prompt_tokens") or 0),
            finish,
            share,
        )

    def slots(self) -> tuple[int, int] | None:
        """Counters of the vLLM plugin, from the server's /metrics; all of its traffic counts. (0, 0) while there are
        none: a fresh server has none before its first answer."""
        try:
            with urllib.request.urlopen(f"{self.url.removesuffix('/v1')}/metrics", timeout=30) as response:
                lines = response.read().decode("utf-8", "replace").splitlines()
        except (OSError, ValueError, http.client.HTTPException):
            return None
        zero, routed = (
            [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(n)] for n in (_ZERO, _ROUTED)
        )
        return int(sum(zero)), int(sum(routed))

    def _call(self, path: str, order: dict | None) -> dict:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if order is None else json.dumps(order).encode()
        for attempt in range(1, self.tries + 1):
            try:
                request = urllib.request.Request(self.url + path, data, headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                said = error.read(500).decode("utf-8", "replace").strip()
                if error.code not in _PASSING or attempt == self.tries:
                    raise UserError(f"{self.url}{path}: {error.code} {error.reason}: {said}") from None
            except ValueError as error:
                raise UserError(f"{self.url}{path}: no address, or its answer is no JSON ({error})") from None
            except (OSError, http.client.HTTPException) as error:
                if attempt == self.tries:
                    raise UserError(
                        f"{self.url}{path}: no answer ({getattr(error, 'reason', error)})"
                    ) from None
            time.sleep(min(30.0, 1.5**attempt))
        raise AssertionError("unreachable")
