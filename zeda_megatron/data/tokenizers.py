"""Tokenizers behind one small interface: Hugging Face folders and sentencepiece models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2
from transformers import AutoTokenizer

from ..errors import UserError
from .records import Message

KINDS = ("auto", "hf", "sentencepiece")
_VOCABULARIES = ("tokenizer.json", "*.model", "*.model.v*", "vocab.*", "*.tiktoken", "tekken.json")


class ChatTokenizer(Protocol):
    """What the rest of the package needs from a tokenizer."""

    eos_id: int
    """The token that ends a response."""
    eos_ids: frozenset[int]
    """Every token that ends a response; holds `eos_id`."""
    pad_id: int
    """Filler; equals `eos_id` where the tokenizer has no padding token."""
    vocab_size: int
    """Number of token ids, added tokens included. A model's embedding may have more rows."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens written out in it count as such, none are added."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`."""

    def render_chat(self, messages: list[Message], add_generation_prompt: bool) -> str:
        """The conversation as text, markers written out; raises `UserError` if the template refuses it."""

    def chat_ids(self, messages: list[Message], add_generation_prompt: bool) -> list[int]:
        """`encode(render_chat(...))`."""

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load_tokenizer` reads back."""


def load_tokenizer(
    path: str | Path,
    kind: str = "auto",
    chat_template_file: str | Path | None = None,
    template_args: dict[str, Any] | None = None,
) -> ChatTokenizer:
    """Load a tokenizer.

    Args:
        path: a folder with HF files, a folder with a sentencepiece `tokenizer.model`, or a `.model` file.
        kind: `hf`, `sentencepiece`, or `auto`: sentencepiece for a `.model` file and for a folder that has
            one but no `tokenizer.json` or `tokenizer_config.json`.
        chat_template_file: jinja2 chat template to use in place of the tokenizer's own.
        template_args: extra template variables, such as `{"enable_thinking": False}` for Qwen3.

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
        if not Path(chat_template_file).is_file():
            raise UserError(f"--chat-template-file {chat_template_file}: no such file")
        template = Path(chat_template_file).read_text("utf-8")
    if kind == "auto":
        kind = "sentencepiece" if _looks_like_sentencepiece(path) else "hf"
    if kind == "hf":
        return HfTokenizer(path, template, template_args or {})
    from .sentencepiece_tokenizer import SentencePieceTokenizer

    return SentencePieceTokenizer(path, template, template_args or {})


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a vocabulary of any kind; without one transformers builds a tokenizer that knows nothing."""
    return any(path for pattern in _VOCABULARIES for path in folder.glob(pattern))


def _looks_like_sentencepiece(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".model"
    hf_files = ("tokenizer.json", "tokenizer_config.json")
    return (path / "tokenizer.model").is_file() and not any((path / f).is_file() for f in hf_files)


class HfTokenizer:
    """A tokenizer folder in the Hugging Face format."""

    def __init__(self, path: Path, template: str | None, template_args: dict[str, Any]):
        if not path.is_dir():
            raise UserError(f"tokenizer {path}: a file; the kind hf needs a folder (or use sentencepiece)")
        if not has_tokenizer(path):
            raise UserError(f"tokenizer {path}: the folder has no tokenizer: give --tokenizer-model")
        try:
            self.hf = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # transformers raises many types for a bad folder
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"tokenizer {path}: cannot be loaded ({reason})") from error
        if template is not None:
            self.hf.chat_template = template
        self.path = path
        self.template_args = template_args
        named = [i for f in ("generation_config.json", "config.json") for i in _named_eos(path / f)]
        if self.hf.eos_token_id is None and not named:
            raise UserError(f'tokenizer {path}: no end token; set "eos_token" in tokenizer_config.json')
        self.eos_id: int = named[0] if self.hf.eos_token_id is None else self.hf.eos_token_id
        self.eos_ids = frozenset([self.eos_id, *named])
        self.pad_id: int = self.eos_id if self.hf.pad_token_id is None else self.hf.pad_token_id
        self.vocab_size = len(self.hf)

    def encode(self, text: str) -> list[int]:
        return self.hf.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.hf.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages: list[Message], add_generation_prompt: bool) -> str:
        if not self.hf.chat_template:
            raise UserError(f"tokenizer {self.path}: no chat template; give one with --chat-template-file")
        try:
            return self.hf.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=False, **self.template_args
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(f"chat template of {self.path} refuses a conversation: {error}") from error

    def chat_ids(self, messages: list[Message], add_generation_prompt: bool) -> list[int]:
        return self.encode(self.render_chat(messages, add_generation_prompt))

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
    if not file.is_file():
        return []
    try:
        ids = json.loads(file.read_text("utf-8")).get("eos_token_id")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid JSON ({error})") from error
    if ids is None:
        return []
    return list(ids) if isinstance(ids, list) else [ids]
