"""What every tokenizer can do for conversations: its chat template, the tokens that end a turn, text in pieces."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ..errors import UserError, cut_short
from .records import Message

_ASKED = "How many?"
_ANSWERED = "Seventeen"
PROBE: list[Message] = [
    {"role": "user", "content": _ASKED},
    {"role": "assistant", "content": _ANSWERED},
    {"role": "user", "content": _ASKED},
]
"""A conversation that shows what a template writes round an answer."""
RUN_DAY = datetime.date(2026, 1, 1)
"""What chat templates that write today's date write in training: a resumed run must read what it read before."""
_ANCHORS = (".", ")", ":", "0", "a")
_NEAR = 256
"""Characters before a piece that can have a say in its tokens."""
_TODAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


class ChatTokenizer(ABC):
    """A tokenizer with a chat template.

    Attributes:
        eos_id: the token that ends a response.
        eos_ids: every token that ends a response; holds `eos_id`.
        pad_id: filler; equals an end token where the tokenizer has no padding token.
        bos_id: the token that a text begins with, if there is one.
        vocab_size: the largest token id + 1. A model's embedding may have more rows.
        longest_token: characters (or bytes) of the longest token.
        template: the chat template as text; None without one.
        template_args: extra template variables.
        name: for messages.
        notes: lines that a run shall say before its first step.
    """

    eos_id: int
    eos_ids: frozenset[int]
    pad_id: int
    bos_id: int | None
    vocab_size: int
    longest_token: int
    template: str | None
    template_args: dict[str, Any]
    name: Path

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens written out in it count as such, none are added."""

    @abstractmethod
    def written_out(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens written out."""

    @abstractmethod
    def is_marker(self, token: int) -> bool:
        """Whether a token was added to mark something, and is no part of ordinary text."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write a folder that `load_tokenizer` reads back."""

    @abstractmethod
    def _rendered(self, template: str, messages: list[Message], add_generation_prompt: bool) -> str:
        """What the template makes of a conversation; raises what the template raises."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Tokens that only frame it (beginning, end, padding) are left out, unless
        `skip_special_tokens` is False; what marks something inside it, such as `</think>`, always stays."""
        if skip_special_tokens:
            frame = {*self.eos_ids, self.pad_id, self.bos_id}
            ids = [i for i in ids if i not in frame]
        return self.written_out(ids)

    def render_chat(self, messages: list[Message], add_generation_prompt: bool) -> str:
        """The conversation as text, markers written out; raises `UserError` if the template refuses it."""
        if not self.template:
            raise UserError(f"tokenizer {self.name}: no chat template; give one with --chat-template-file")
        template = self.template if self.day is None else _on_day(self.template, self.day)
        try:
            return self._rendered(template, messages, add_generation_prompt)
        # A template is a program: it may also divide by zero, or look for what is not there.
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
        ) as error:
            reason = cut_short(str(error).strip() or type(error).__name__, 200)
            raise UserError(f"chat template of {self.name} refuses a conversation: {reason}") from error

    def chat_ids(self, messages: list[Message], add_generation_prompt: bool) -> list[int]:
        """`encode(render_chat(...))`."""
        return self.encode(self.render_chat(messages, add_generation_prompt))

    def encode_after(self, before: str, text: str) -> list[int]:
        """Ids of `text` that goes on from `before`, whose own ids stay as they are: what is sampled behind a prompt.

        Some tokenizers put a space before whatever they are given, so there a piece is encoded together with what
        stands before it, and cut off.
        """
        if self._pieces_stand_alone or not before:
            return self.encode(text)
        for ahead in (before[-_NEAR:], *self._anchors):
            head, both = self.encode(ahead), self.encode(ahead + text)
            if head and both[: len(head)] == head:
                return both[len(head) :]
        return self.encode(text)

    def surely_longer(self, text: str, tokens: int) -> bool:
        """Whether a text is so long that it must have more than so many tokens; encoding it would take gigabytes."""
        # Normalising a text may shorten it, but hardly to a quarter.
        return len(text) > 4 * max(self.longest_token, 1) * tokens

    def fingerprint(self) -> str:
        """Equal for tokenizers that make the same tokens of a conversation; the day counts if one was given and the
        template writes it."""
        day = str(self.day) if self.day and self.tells_the_day else ""
        facts = [self.template, self.template_args, day, sorted(self.eos_ids), self.pad_id]
        facts += [self.vocab_size, self.encode("".join(map(chr, range(32, 127)))), self.encode("été 日本 🙂")]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def tells_the_day(self) -> bool:
        """Whether the chat template writes the date of the day."""
        return "strftime_now" in (self.template or "")

    def _settle(self, named: Iterable[int], day: datetime.date | None) -> None:
        """Find out what the tokenizer does with ends and pieces; to be called last by a constructor.

        Args:
            named: the end tokens that its files name, the tokenizer's own first.
            day: what a template that writes today's date shall write; None: today's.
        """
        named = list(named)
        self.day = day
        self.notes: list[str] = []
        if day is not None and self.tells_the_day:
            self.notes.append(
                f"the chat template of {self.name} writes the date: always {day} here, so that a resumed run reads the "
                "same"
            )
        self.eos_id, self.eos_ids = named[0], frozenset(named)
        doubled = (self.written_out(self.encode(piece) * 2) == piece * 2 for piece in ("x", "1", "(", " x "))
        self._pieces_stand_alone = all(doubled)
        self._anchors = [c for c in _ANCHORS if self.written_out(self.encode(c)).strip() == c]
        self._find_end(named[0])

    def _find_end(self, named: int) -> None:
        """Take the token that the template ends an answer with for an end token, whatever the files name."""
        # A template that closes a turn shows it behind the last answer; one that does not (GLM), before the next
        # question.
        for messages, closes in ((PROBE[:2], True), (PROBE, False)):
            behind = self._behind_the_answer(messages)
            ids = self.encode(behind)
            if not ids:
                continue
            known = ids[0] in self.eos_ids
            if known or (self.is_marker(ids[0]) and ids[0] != self.bos_id):
                self.eos_ids |= {ids[0]}
                self.eos_id = ids[0] if closes else self.eos_id
                if not known:
                    end, other = self.written_out(ids[:1]), self.written_out([named])
                    self.notes.append(
                        f"the chat template of {self.name} ends a turn with {end!r}, its files name {other!r}: {end!r} "
                        "is learned and sampled to; name it as eos_token_id where the model is served"
                    )
            elif closes and not self.eos_ids.intersection(ids):
                self.notes.append(
                    f"the chat template of {self.name} ends a turn with {cut_short(behind)!r}, which is no token: "
                    f"answers are learned with it and {self.written_out([named])!r} behind it"
                )
            else:
                continue
            return

    def _behind_the_answer(self, messages: list[Message]) -> str:
        """What the template writes behind the answer of the probe, without the space between; "" if it cannot be
        told."""
        try:
            text = self.render_chat(messages, False)
        except UserError as error:
            if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
                raise
            return ""  # no template, or one that wants another conversation
        return text.rpartition(_ANSWERED)[2].lstrip() if _ANSWERED in text else ""


def _on_day(template: str, day: datetime.date) -> str:
    """The template with the date written out. (Templates get plain values only, so it cannot be handed over.)"""
    then = datetime.datetime(day.year, day.month, day.day)
    return _TODAY.sub(lambda call: call[1] + then.strftime(call[2]) + call[1], template)
