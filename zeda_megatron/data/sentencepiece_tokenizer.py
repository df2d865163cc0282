"""A sentencepiece `.model` file as a chat tokenizer."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import sentencepiece
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import UserError
from .records import Message

_TEMPLATE_FILE = "chat_template.jinja"
PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""Chat format of a model that comes without one: `<s>User: question Assistant: answer</s>User: ...`.

Turns are parted by spaces, since many sentencepiece models have no newline.
"""


class SentencePieceTokenizer:
    """A sentencepiece model with a chat template: the given one, the folder's own, or `PLAIN_TEMPLATE`."""

    def __init__(self, path: Path, template: str | None, template_args: dict[str, Any]):
        self.file = path / "tokenizer.model" if path.is_dir() else path
        if not self.file.is_file():
            raise UserError(f"tokenizer {path}: the folder has no tokenizer.model")
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(self.file))
        except (RuntimeError, OSError) as error:
            raise UserError(f"tokenizer {self.file}: not a sentencepiece model ({error})") from error
        if self.model.eos_id() < 0:
            raise UserError(f"tokenizer {self.file}: the model has no end token; train it with an eos_id")
        own = path / _TEMPLATE_FILE
        if template is None and path.is_dir() and own.is_file():
            template = own.read_text("utf-8")
        self.template = template or PLAIN_TEMPLATE
        try:
            # The settings that chat templates are written for (those of transformers).
            sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
            sandbox.globals["raise_exception"] = _raise_exception
            self._compiled = sandbox.from_string(self.template)
        except jinja2.TemplateError as error:
            raise UserError(f"chat template of {self.file}: {error}") from error
        self.template_args = template_args
        self.eos_id: int = self.model.eos_id()
        self.eos_ids = frozenset([self.eos_id])
        self.pad_id: int = self.model.pad_id() if self.model.pad_id() >= 0 else self.eos_id
        self.vocab_size: int = self.model.vocab_size()
        # Control pieces (<s>, </s>, chat markers) are never produced from text by the model itself.
        self._control = {
            self.model.id_to_piece(i): i for i in range(self.vocab_size) if self.model.is_control(i)
        }
        longest_first = sorted(self._control, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text):
            if part in self._control:
                ids.append(self._control[part])
            elif part:
                ids += self.model.encode(part)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; with `skip_special_tokens=False` control pieces are written out."""
        if skip_special_tokens:
            return self.model.decode([i for i in ids if not self.model.is_control(i)])
        text, run = "", []
        for i in [*ids, None]:
            if i is not None and not self.model.is_control(i):
                run.append(i)
                continue
            text += self.model.decode(run) if run else ""
            text += self.model.id_to_piece(i) if i is not None else ""
            run = []
        return text

    def render_chat(self, messages: list[Message], add_generation_prompt: bool) -> str:
        bos = self.model.bos_id()
        names = {
            "bos_token": self.model.id_to_piece(bos) if bos >= 0 else "",
            "eos_token": self.model.id_to_piece(self.eos_id),
        }
        try:
            return self._compiled.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **(names | self.template_args)
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(f"chat template of {self.file} refuses a conversation: {error}") from error

    def chat_ids(self, messages: list[Message], add_generation_prompt: bool) -> list[int]:
        return self.encode(self.render_chat(messages, add_generation_prompt))

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "tokenizer.model").resolve() != self.file.resolve():
            shutil.copyfile(self.file, folder / "tokenizer.model")
        (folder / _TEMPLATE_FILE).write_text(self.template, "utf-8")


def _raise_exception(message: str) -> None:
    """What templates call to refuse a conversation."""
    raise jinja2.TemplateError(message)
