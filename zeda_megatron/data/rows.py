"""From rollout files to packed rows: the one way for training, held-out text, fits and plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, islice

from ..errors import UserError
from .chat_tokenizer import ChatTokenizer
from .conversation import pieces_differ, tokenize_rollouts
from .packing import PackedBatch, PackedDataset
from .prompts import load_rollouts

LOOKED_AT = 8
"""Conversations that are encoded in pieces and as a whole, to compare."""


def rows_for(
    files: Sequence[str],
    tokenizer: ChatTokenizer,
    seq_length: int,
    *,
    overlong: str = "error",
    seed: int = 0,
    align: int = 1,
    flag: str = "--data-path",
    say: Callable[[str], None] = lambda line: None,
) -> PackedDataset:
    """Packed rows of rollout files.

    Args:
        files: read one after the other.
        tokenizer: of the model.
        seq_length: S.
        overlong: what becomes of longer conversations (`tokenize_rollouts`).
        seed: of the order.
        align: every sequence is padded to a multiple of this.
        flag: that named the files, for messages.
        say: gets lines about what was left out, and about texts that are not learned as the template writes them.

    Raises:
        UserError: naming file and line or sample, or no conversation is left.
    """
    source = ", ".join(map(str, files))
    rollouts = load_rollouts(files)
    different = pieces_differ(islice(rollouts, LOOKED_AT), tokenizer)
    if different:
        say(different)
    samples = tokenize_rollouts(rollouts, tokenizer, seq_length, overlong, source, say)
    first = next(samples, None)
    if first is None:
        raise UserError(
            f"{flag} {source}: no conversation is left (the files are empty, or all were left out: --overlong, answers "
            "cut off while thinking)"
        )
    return PackedDataset(chain([first], samples), seq_length, tokenizer.pad_id, seed, align)


def load_rows(file: str, tokenizer: ChatTokenizer, seq_length: int, count: int) -> list[PackedBatch]:
    """The first packed rows of a rollout file."""
    packed = rows_for([file], tokenizer, seq_length, overlong="skip")
    return [packed[i] for i in range(min(count, packed.rows_in_epoch(0)))]
