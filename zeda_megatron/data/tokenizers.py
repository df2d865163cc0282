"""Tokenizers behind one small interface: Hugging Face folders and sentencepiece models."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..errors import UserError, cut_short
from ..regular_file import is_regular, read_regular
from ..strict_json import is_int, read_json
from .chat_tokenizer import ChatTokenizer
from .records import Message

__all__ = ["KINDS", "ChatTokenizer", "HfTokenizer", "load_tokenizer"]
KINDS = ("auto", "hf", "sentencepiece")
_VOCABULARIES = ("tokenizer.json", "*.model", "*.model.v*", "vocab.*", "*.tiktoken", "tekken.json")


def load_tokenizer(
    path: str | Path,
    kind: str = "auto",
    chat_template_file: str | Path | None = None,
    template_args: dict[str, Any] | None = None,
    day: datetime.date | None = None,
) -> ChatTokenizer:
    """Load a tokenizer.

    Args:
        path: a folder with HF files, a folder with a sentencepiece `tokenizer.model`, or a `.model` file.
        kind: `hf`, `sentencepiece`, or `auto`: sentencepiece for a `.model` file and for a folder that has
            one but no `tokenizer.json` or `tokenizer_config.json`.
        chat_template_file: jinja2 chat template to use in place of the tokenizer's own.
        template_args: extra template variables, such as `{"enable_thinking": False}` for Qwen3.
        day: what a template that writes today's date shall write; None: today's.

    Raises:
        UserError: missing files, unknown kind, unreadable tokenizer, no end token.
    """
    path = Path(path)
    if kind not in KINDS:
        raise UserError(f"tokenizer kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if not path.exists():
        raise UserError(f"tokenizer {path}: no such file or folder")
    template = None
    if chat_template_file is not None:
        template = _template_in(chat_template_file)
    if kind == "auto":
        kind = "sentencepiece" if _looks_like_sentencepiece(path) else "hf"
    if kind == "hf":
        return HfTokenizer(path, template, template_args or {}, day)
    from .sentencepiece_tokenizer import SentencePieceTokenizer

    return SentencePieceTokenizer(path, template, template_args or {}, day)


def _template_in(file: str | Path) -> str:
    try:
        return read_regular(file).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"--chat-template-file {file}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--chat-template-file {file}: not UTF-8 (byte {error.start + 1})") from None


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a vocabulary of any kind; without one transformers builds a tokenizer that knows nothing."""
    return any(path for pattern in _VOCABULARIES for path in folder.glob(pattern))


def _looks_like_sentencepiece(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".model"
    hf_files = ("tokenizer.json", "tokenizer_config.json")
    return (path / "tokenizer.model").is_file() and not any((path / f).is_file() for f in hf_files)


class HfTokenizer(ChatTokenizer):
    """A tokenizer folder in the Hugging Face format."""

    def __init__(
        self,
        path: Path,
        template: str | None,
        template_args: dict[str, Any],
        day: datetime.date | None = None,
    ):
        if not path.is_dir():
            raise UserError(f"tokenizer {path}: a file; the kind hf needs a folder (or use sentencepiece)")
        if not has_tokenizer(path):
            raise UserError(f"tokenizer {path}: the folder has no tokenizer: give --tokenizer-model")
        try:
            self.hf = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # transformers raises many types for a bad folder
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"tokenizer {path}: cannot be loaded ({reason})") from error
        vocabulary = self.hf.get_vocab()
        if not vocabulary:
            raise UserError(f"tokenizer {path}: the folder has none; give one with --tokenizer-model")
        if template is not None:
            self.hf.chat_template = template
        self.path = self.name = path
        self.template_args = template_args
        try:
            self.template = self.hf.get_chat_template() if self.hf.chat_template else None
        except ValueError as error:  # several by name, none of them the default
            raise UserError(f"tokenizer {path}: {cut_short(str(error), 300)}") from error
        named = [i for f in ("generation_config.json", "config.json") for i in _named_eos(path / f)]
        named = [i for i in [self.hf.eos_token_id, *named] if i is not None]
        if not named:
            raise UserError(f'tokenizer {path}: no end token; set "eos_token" in tokenizer_config.json')
        self.pad_id: int = named[0] if self.hf.pad_token_id is None else self.hf.pad_token_id
        self.bos_id = self.hf.bos_token_id
        # Ids may have gaps, so their number says nothing.
        self.vocab_size = max(vocabulary.values()) + 1
        self.longest_token = max(map(len, vocabulary))
        self._added = self.hf.added_tokens_decoder
        self._settle(named, day)

    def encode(self, text: str) -> list[int]:
        return self.hf.encode(text, add_special_tokens=False, verbose=False)

    def written_out(self, ids: Sequence[int]) -> str:
        return self.hf.decode(list(ids), skip_special_tokens=False)

    def is_marker(self, token: int) -> bool:
        added = self._added.get(token)
        return added is not None and (added.special or not added.content[:1].isalnum())

    def _rendered(self, template: str, messages: list[Message], add_generation_prompt: bool) -> str:
        return self.hf.apply_chat_template(
            messages,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **self.template_args,
        )

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.hf.save_pretrained(str(folder))
        # Further end tokens are named there, not in the tokenizer's own files.
        source, target = self.path / "generation_config.json", folder / "generation_config.json"
        if source.is_file() and not target.exists():
            shutil.copyfile(source, target)


def _named_eos(file: Path) -> list[int]:
    """End tokens named by a model's (generation) config next to the tokenizer, if there is one."""
    if not is_regular(file):
        return []
    config = read_json(file)
    inner = config.get("text_config")  # of a model that sees, too
    ids = config.get("eos_token_id", inner.get("eos_token_id") if isinstance(inner, dict) else None)
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(is_int(i) and i >= 0 for i in ids):
        raise UserError(f'{file}: "eos_token_id" must be a token id or a list of them')
    return ids
