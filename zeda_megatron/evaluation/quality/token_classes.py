"""What kind of text a token is: a digit, a letter, punctuation, whitespace."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ...data.tokenizers import ChatTokenizer

CLASSES = ("digits", "letters_begin", "letters_inside", "punctuation", "whitespace", "other")
"""`letters_begin`: first token of a word. `other`: markers and pieces of a character."""
_DIGITS, _BEGIN, _INSIDE, _PUNCTUATION, _WHITESPACE, _OTHER = range(len(CLASSES))
_BY_CATEGORY = {"N": _DIGITS, "L": _INSIDE, "M": _INSIDE, "P": _PUNCTUATION, "S": _PUNCTUATION}
"""By the first letter of a character's Unicode category. Combining marks belong to words."""


@dataclass(frozen=True)
class TokenText:
    """What a token's text says of it and of the next token."""

    kind: int
    """Index into CLASSES; any token of a word counts as `letters_inside` here."""
    apart: bool
    """Its text begins with whitespace."""
    open_word: bool
    """Its text ends inside a word: a letter that follows goes on with it."""


@dataclass
class TokenClasses:
    """Classes of tokens, from the first character of their text that is no whitespace."""

    tokenizer: ChatTokenizer
    """Decodes the tokens."""
    is_marker: Callable[[int], bool] = lambda token: False
    """Whether a token marks something, and is no text."""
    known: dict[int, TokenText] = field(default_factory=dict, repr=False)
    """Tokens seen so far."""

    def __post_init__(self) -> None:
        # Many tokenizers strip the space of a first token, so every token is decoded behind this one.
        self._before = self.tokenizer.encode("a")
        self._prefix = self.tokenizer.decode(self._before)

    def of_row(self, tokens_S: torch.Tensor, position_ids_S: torch.Tensor) -> torch.Tensor:
        """Classes of a packed row, [S] int64 indices into CLASSES.

        Args:
            tokens_S: int64.
            position_ids_S: int64, 0 where a sequence begins: its first token continues no word.
        """
        ids_U, place_S = tokens_S.unique(return_inverse=True)
        texts = [self.text(i) for i in ids_U.tolist()]
        kind_S = torch.tensor([text.kind for text in texts])[place_S]
        apart_S = torch.tensor([text.apart for text in texts])[place_S]
        open_S = torch.tensor([text.open_word for text in texts])[place_S].roll(1) & (position_ids_S > 0)
        return kind_S.masked_fill((kind_S == _INSIDE) & (apart_S | ~open_S), _BEGIN)

    def text(self, token: int) -> TokenText:
        """What the text of one token id says."""
        if token not in self.known:
            text = self.tokenizer.decode([*self._before, token])
            if text.startswith(self._prefix):
                text = text[len(self._prefix) :]
            else:
                text = self.tokenizer.decode([token])
            if self.is_marker(token):
                text = ""
            self.known[token] = TokenText(
                _kind(text), text[:1].isspace(), bool(text) and unicodedata.category(text[-1])[0] in "LM"
            )
        return self.known[token]


def _kind(text: str) -> int:
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        return _OTHER
    bare = text.lstrip()
    return _BY_CATEGORY.get(unicodedata.category(bare[0])[0], _OTHER) if bare else _WHITESPACE
