"""What is known of every scored token: how much it skipped, and what may go with that.

And what kind of text a token is: a digit, a letter, punctuation, whitespace.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch

from ...data.packing import PackedBatch
from ...data.tokenizers import ChatTokenizer
from ...ops.vocab_scores import local_scores

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


@dataclass(frozen=True)
class ScoredTokens:
    """The T tokens whose next token belongs to a response; all [T], on the host."""

    skipped_T: torch.Tensor
    """float64: share of the token's picks, over all MoE layers, that no real expert computed."""
    entropy_T: torch.Tensor
    """float64: entropy of the teacher's distribution of the next token, nats."""
    gap_T: torch.Tensor
    """float64: |log p_teacher - log p_student| of the next token, nats."""
    position_T: torch.Tensor
    """int64: index of the next token in its response, from 0."""
    class_T: torch.Tensor
    """int64: class of the token itself, index into CLASSES."""

    @classmethod
    def of_row(
        cls,
        row: PackedBatch,
        skipped_S: torch.Tensor,
        student: tuple[torch.Tensor, torch.Tensor],
        teacher: tuple[torch.Tensor, torch.Tensor],
        vocab_size: int,
        classes: TokenClasses,
    ) -> ScoredTokens:
        """The scored tokens of one packed row of S tokens.

        Args:
            row: tells which positions are scored.
            skipped_S: as `stats.take_skipped` gives it.
            student, teacher: last hidden states [S, 1, H] and LM head [V, H].
            vocab_size: columns from there on are padding of the heads.
        """
        scored_T = row.loss_mask[0].cpu().nonzero().squeeze(1)
        labels_T = row.labels[0].cpu()[scored_T]
        scores = []
        for hidden_SBH, head_VH in (student, teacher):
            hidden_TH = hidden_SBH.flatten(0, 1)[scored_T.to(hidden_SBH.device)]
            labels = labels_T.to(hidden_TH.device)
            scores.append(next_token_scores(hidden_TH, head_VH[:vocab_size], labels))
        (log_p_T, _), (log_q_T, entropy_T) = scores
        return cls(
            skipped_S.cpu()[scored_T],
            entropy_T.double().cpu(),
            (log_q_T - log_p_T).abs().double().cpu(),
            response_positions(row.loss_mask[0].cpu())[scored_T],
            classes.of_row(row.tokens[0].cpu(), row.position_ids[0].cpu())[scored_T],
        )

    @classmethod
    def join(cls, parts: list[ScoredTokens]) -> ScoredTokens:
        """Several rows (or kinds of text) as one; at least one."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def __len__(self) -> int:
        return self.skipped_T.numel()


def response_positions(loss_mask_S: torch.Tensor) -> torch.Tensor:
    """Index of each scored position in its response, from 0 at every response of a packed row; [S] int64.

    What stands elsewhere has no meaning. Two responses never touch: the last token of a sequence has no next one,
    and between two turns of a conversation stands a prompt.
    """
    scored_S = loss_mask_S > 0
    index_S = torch.arange(scored_S.numel())
    begins_S = scored_S & ~torch.nn.functional.pad(scored_S[:-1], (1, 0))
    return index_S - index_S.where(begins_S, 0).cummax(0).values


@torch.no_grad()
def next_token_scores(
    hidden_TH: torch.Tensor, head_VH: torch.Tensor, labels_T: torch.Tensor, chunk_tokens: int = 1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of the next token, and entropy of the whole distribution; no [T, V] tensor ever exists.

    Args:
        hidden_TH, head_VH: last hidden states and LM head without padding, in one dtype.
        labels_T: int64, the next tokens.
        chunk_tokens: tokens whose logits exist at the same time.

    Returns:
        log p [T] and entropy [T] in nats, float32 (float64 for float64 inputs). With z the logits minus their
        maximum and Z = sum exp z: log p = z[label] - log Z, entropy = log Z - sum(z exp z) / Z.
    """
    values = []
    for hidden_CH, labels_C in zip(hidden_TH.split(chunk_tokens), labels_T.split(chunk_tokens)):
        shifted_CV, exp_CV, (_, sum_C, _, label_C) = local_scores(hidden_CH, head_VH, labels_C, 0, 1.0)
        log_sum_C = sum_C.log()
        entropy_C = log_sum_C - (shifted_CV * exp_CV).sum(1) / sum_C
        values.append(torch.stack([label_C - log_sum_C, entropy_C.clamp(min=0.0)]))
    log_p_T, entropy_T = torch.cat(values, dim=1)
    return log_p_T, entropy_T
