"""A sentencepiece `.model` file as a chat tokenizer."""

from __future__ import annotations

import datetime
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import UserError
from .chat_tokenizer import ChatTokenizer
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


class SentencePieceTokenizer(ChatTokenizer):
    """A sentencepiece model with a chat template: the given one, the folder's own, or `PLAIN_TEMPLATE`."""

    def __init__(
        self,
        path: Path,
        template: str | None,
        template_args: dict[str, Any],
        day: datetime.date | None = None,
    ):
        self.file = self.name = path / "tokenizer.model" if path.is_dir() else path
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
        self.template_args = template_args
        eos, bos = self.model.eos_id(), self.model.bos_id()
        self.pad_id: int = self.model.pad_id() if self.model.pad_id() >= 0 else eos
        self.bos_id = bos if bos >= 0 else None
        self.vocab_size: int = self.model.vocab_size()
        pieces = [self.model.id_to_piece(i) for i in range(self.vocab_size)]
        self.longest_token = max(map(len, pieces))
        # Control pieces (<s>, </s>, chat markers) are never produced from text by the model itself.
        self._control = {piece: i for i, piece in enumerate(pieces) if self.model.is_control(i)}
        longest_first = sorted(self._control, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._settle([eos], day)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text):
            if part in self._control:
                ids.append(self._control[part])
            elif part:
                ids += self.model.encode(part)
        return ids

    def written_out(self, ids: Sequence[int]) -> str:
        text, run = "", []
        for i in [*ids, None]:
            if i is not None and not self.model.is_control(i):
                run.append(i)
                continue
            text += self.model.decode(run) if run else ""
            text += self.model.id_to_piece(i) if i is not None else ""
            run = []
        return text

    def is_marker(self, token: int) -> bool:
        piece = self.model.id_to_piece(token)
        # Symbols that a user defined are like any piece to the model.
        return self.model.is_control(token) or (
            re.fullmatch(r"<[^<>]+>", piece) is not None and not self.model.is_byte(token)
        )

    def _rendered(self, template: str, messages: list[Message], add_generation_prompt: bool) -> str:
        names = {
            "bos_token": "" if self.bos_id is None else self.model.id_to_piece(self.bos_id),
            "eos_token": self.model.id_to_piece(self.model.eos_id()),
        }
        # The environment that chat templates are written for, strftime_now and all.
        texts, _ = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            **(names | self.template_args),
        )
        return texts[0]

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "tokenizer.model").resolve() != self.file.resolve():
            shutil.copyfile(self.file, folder / "tokenizer.model")
        (folder / _TEMPLATE_FILE).write_text(self.template, "utf-8")
