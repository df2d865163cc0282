"""A model behind a server that speaks OpenAI's chat protocol, such as `vllm serve`."""

from __future__ import annotations

import http.client
import math
from pathlib import Path
from typing import Any

from ...config.generate import SamplingConfig
from ...data.tokenizers import load_tokenizer
from ...errors import UserError
from ...runtime.fetch import fetch
from ...runtime.openai_server import END, THINK, OpenAIServer, chat_text, choice_of, usage_of
from ...strict_json import read_json
from .engine import About, Answer, ChatPrompts, Origin, Request
from .transformers_engine import extra_costs

_METRICS_BYTES = 16 << 20
_ZERO, _ROUTED = "zeda:zero_slots_total", "zeda:routed_slots_total"
"""Counters of this project's vLLM plugin."""


class OpenAIEngine:
    """Asks a server, several questions at a time. Each answer's seed goes with it; whether it counts is the server's.

    Args:
        url, model, timeout, key_variable, tries: see `OpenAIServer`.
        parallel: questions under way at a time.
        config_folder: folder with the model's config.json, for FLOP counts; with its tokenizer and chat template, if it
            has them, prompts are known, and with them whether an answer begins inside the thinking.
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
        self.server = OpenAIServer(url, model, timeout, key_variable, tries)
        self.url, self.model = self.server.url, self.server.model
        self.group, self.parallel = 1, parallel
        self.template_args = template_args or {}
        self.prompts = _prompts(config_folder, self.template_args) if config_folder else None
        config = read_json(Path(config_folder) / "config.json") if config_folder else None
        costs = extra_costs(config) if config else (0.0, 0.0)
        settings = {"template_args": self.template_args} if self.template_args else {}
        known = {"prompts": self.prompts.digest} if self.prompts else {}
        name, origin = f"served as {self.model}", Origin.of_config(config)
        self.about = About(self.url, config, name, *costs, settings, origin, **known)

    def answer(self, requests: list[Request], sampling: SamplingConfig) -> list[Answer]:
        return [self._one(request, sampling) for request in requests]

    def _one(self, request: Request, sampling: SamplingConfig) -> Answer:
        order: dict[str, Any] = {
            "messages": request.messages,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed_of(request.stream, bits=31),
        }
        if sampling.top_k:
            order["top_k"] = sampling.top_k  # not OpenAI's, but every open server's
        if self.template_args:
            order["chat_template_kwargs"] = self.template_args
        got = self.server.ask("/chat/completions", order, sampling.max_new_tokens)
        where = f"{self.url}: its answer to {request.name}"
        choice, finish = choice_of(got, where)
        text, apart = chat_text(choice, finish, where)
        usage = usage_of(got, where)
        return Answer(
            text if apart else self._whole(request, text, finish),
            usage["completion_tokens"],
            usage["prompt_tokens"],
            finish,
            usage["zero_share"],
        )

    def _whole(self, request: Request, content: str, finish: str) -> str:
        """Thinking and answer as the model wrote them.

        A cut-off text without marks may be thinking that the prompt opened. Where the prompt is not known (no
        --config-folder with a chat template), it is taken for that: no answer is better than half a thought.
        """
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
            text = fetch(f"{self.url.removesuffix('/v1')}/metrics", 30.0, _METRICS_BYTES)
            lines = text.decode("utf-8", "replace").splitlines()
            sums = [
                math.fsum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))
                for name in (_ZERO, _ROUTED)
            ]
            return int(sums[0]), int(sums[1])
        except (UserError, OSError, ValueError, IndexError, OverflowError, http.client.HTTPException):
            return None


def _prompts(folder: str, template_args: dict[str, Any]) -> ChatPrompts | None:
    if not (Path(folder) / "tokenizer_config.json").is_file():
        return None
    tokenizer = load_tokenizer(folder, "hf", template_args=template_args)
    return ChatPrompts(tokenizer) if getattr(tokenizer.hf, "chat_template", None) else None
