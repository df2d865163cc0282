"""Samples packed into rows of equal length, with random access by row number.

The order of rows is a function of (samples, row length, seed) alone, so the data state of a training run is
one integer: the number of rows consumed. Rank r of n data-parallel ranks takes rows r, r + n, r + 2n, ...
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import UserError
from .conversation import TokenSample

_OPEN_ROWS = 64


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: one packed row of exactly S tokens (thd layout, batch size 1)."""

    tokens: Tensor
    """int64 [1, S]."""
    labels: Tensor
    """int64 [1, S]: the next token of the same sequence; the padding id where there is none."""
    loss_mask: Tensor
    """float32 [1, S]: 1 where the label is a response token."""
    position_ids: Tensor
    """int64 [1, S]: counted from 0 in each sequence."""
    padding_mask: Tensor
    """bool [1, S]: True for padding."""
    cu_seqlens: Tensor
    """int32 [n + 1]: bounds of the n sequences; padding at the end of the row is the last sequence."""
    max_seqlen: int
    """Length of the longest sequence."""
    kinds: tuple[str, ...] = ()
    """Domain of each sequence ("" for padding)."""
    picks: Tensor | None = None
    """int16 [1, S, L, K]: experts that routing replay takes (`moe.replay`); -1 leaves it to the router."""
    drawn: Tensor | None = None
    """float32 [1, S]: log-probability that the label was sampled with, where an older student sampled it."""

    def to(self, device: torch.device | str) -> PackedBatch:
        """A copy with every tensor on `device`."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def blank_row(seq_length: int, pad_id: int) -> PackedBatch:
    """A row of padding alone, for a rank that has nothing to do."""
    pad = torch.full((1, seq_length), pad_id)
    return PackedBatch(
        tokens=pad,
        labels=pad.clone(),
        loss_mask=torch.zeros(1, seq_length),
        position_ids=torch.arange(seq_length)[None],
        padding_mask=torch.ones(1, seq_length, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, seq_length], dtype=torch.int32),
        max_seqlen=seq_length,
        kinds=("",),
    )


def pack_first_fit(lengths: list[int], order: list[int], seq_length: int) -> list[list[int]]:
    """Put samples into rows of `seq_length`: each into the first open row with room, else into a new one.

    Only the newest rows stay open, so the work grows linearly and neighbours in `order` stay close.

    Args:
        lengths: of every sample, each at most `seq_length`.
        order: sample numbers in the order of packing.

    Returns:
        Rows of sample numbers, in the order in which they were opened.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for sample in order:
        length = lengths[sample]
        for row in range(max(0, len(rows) - _OPEN_ROWS), len(rows)):
            if free[row] >= length:
                rows[row].append(sample)
                free[row] -= length
                break
        else:
            rows.append([sample])
            free.append(seq_length - length)
    return rows


class PackedDataset:
    """An endless sequence of `PackedBatch` rows; every epoch shuffles and packs anew.

    Args:
        samples: tokenised conversations of at most `seq_length` tokens.
        seq_length: S.
        pad_id: token id of padding.
        seed: of the shuffle.
        align: every sequence is padded to a multiple of this (context parallelism needs 2 x its size).

    Raises:
        UserError: no samples, a sample that is too long, S not a multiple of `align`.
    """

    def __init__(
        self, samples: Iterable[TokenSample], seq_length: int, pad_id: int, seed: int, align: int = 1
    ):
        if seq_length < 2 or seq_length % align:
            raise UserError(f"--seq-length {seq_length} must be at least 2 and a multiple of {align}")
        self.seq_length, self.pad_id, self.align = seq_length, pad_id, align
        # Flat arrays: five bytes a token, where lists of Python integers take forty.
        tokens, is_response, starts = array("i"), bytearray(), array("q", [0])
        self.kinds: list[str] = []
        names: dict[str, str] = {}
        for number, sample in enumerate(samples, 1):
            if not 0 < len(sample.tokens) <= seq_length:
                raise UserError(
                    f"sample {number} has {len(sample.tokens)} tokens; "
                    f"a row holds 1 to {seq_length} (--seq-length)"
                )
            if len(sample.tokens) != len(sample.is_response):
                raise ValueError(f"sample {number}: tokens and is_response differ in length")
            tokens.extend(sample.tokens)
            is_response.extend(sample.is_response)
            starts.append(len(tokens))
            self.kinds.append(names.setdefault(sample.kind, sample.kind))
        if not self.kinds:
            raise UserError(
                "no samples to train on: the data is empty, or every sample was left out as overlong"
            )
        self._tokens = torch.frombuffer(tokens, dtype=torch.int32).clone()
        self._is_response = torch.frombuffer(is_response, dtype=torch.bool).clone()
        self._starts = torch.frombuffer(starts, dtype=torch.int64).clone()
        sizes = self._starts.diff()
        self._sizes: list[int] = sizes.tolist()
        self._room: list[int] = (-(-sizes // align) * align).tolist()
        self._order = EpochOrder(len(self._sizes), seed)
        self._first_row = [0]
        # Neighbouring rows share an epoch; two cover the crossing from one to the next.
        self._plan = lru_cache(maxsize=2)(self._make_plan)

    @property
    def num_samples(self) -> int:
        """Number of samples in an epoch."""
        return len(self._sizes)

    def lengths(self) -> list[int]:
        """Tokens of every sample."""
        return list(self._sizes)

    def fingerprint(self) -> str:
        """Hash of everything that decides which token stands where; a resumed run compares it."""
        digest = hashlib.sha256(f"{self.seq_length} {self.pad_id} {self.align} {self._order.seed}".encode())
        for part in (self._tokens, self._is_response, self._starts):
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()

    def rows_in_epoch(self, epoch: int) -> int:
        """Number of rows that `epoch` (from 0) takes; differs a little between epochs."""
        return len(self._plan(epoch))

    def locate(self, row: int) -> tuple[int, int]:
        """Epoch of a global row number, and its place in that epoch."""
        if row < 0:
            raise IndexError(f"row {row} is negative")
        while self._first_row[-1] <= row:
            self._first_row.append(self._first_row[-1] + self.rows_in_epoch(len(self._first_row) - 1))
        epoch = next(e for e in range(len(self._first_row) - 2, -1, -1) if self._first_row[e] <= row)
        return epoch, row - self._first_row[epoch]

    def row_samples(self, row: int) -> list[int]:
        """Numbers of the samples in a global row, in order."""
        epoch, place = self.locate(row)
        return self._plan(epoch)[place]

    def __getitem__(self, row: int) -> PackedBatch:
        return self._collate(self.row_samples(row))

    def _make_plan(self, epoch: int) -> list[list[int]]:
        return pack_first_fit(self._room, self._order.epoch(epoch), self.seq_length)

    def _collate(self, samples: list[int]) -> PackedBatch:
        S = self.seq_length
        sizes, room = [self._sizes[i] for i in samples], [self._room[i] for i in samples]
        starts, kinds = self._starts[samples].tolist(), [self.kinds[i] for i in samples]
        if sum(room) < S:
            sizes, room, starts, kinds = sizes + [0], room + [S - sum(room)], starts + [0], kinds + [""]
        room_N = torch.tensor(room)
        cu_seqlens = torch.nn.functional.pad(room_N.cumsum(0), (1, 0))
        sequence_S = torch.repeat_interleave(torch.arange(len(room)), room_N)
        position_S = torch.arange(S) - cu_seqlens[sequence_S]
        left_S = torch.tensor(sizes)[sequence_S] - position_S
        source_S = torch.tensor(starts)[sequence_S] + position_S
        is_real_S, has_next_S = left_S > 0, left_S > 1
        here_S, next_S = source_S * is_real_S, (source_S + 1) * has_next_S
        pad = torch.tensor(self.pad_id)
        return PackedBatch(
            tokens=torch.where(is_real_S, self._tokens[here_S].long(), pad)[None],
            labels=torch.where(has_next_S, self._tokens[next_S].long(), pad)[None],
            loss_mask=(has_next_S & self._is_response[next_S]).float()[None],
            position_ids=position_S[None],
            padding_mask=~is_real_S[None],
            cu_seqlens=cu_seqlens.int(),
            max_seqlen=max(room),
            kinds=tuple(kinds),
        )


class EpochOrder:
    """Item numbers by position: position p lies in epoch p // n, and every epoch is its own shuffle.

    Args:
        num_items: n, at least 1.
        seed: of all shuffles.
    """

    def __init__(self, num_items: int, seed: int):
        self.num_items, self.seed = num_items, seed
        self._cached = lru_cache(maxsize=2)(self._shuffle)

    def epoch(self, epoch: int) -> list[int]:
        """All item numbers in the order of `epoch` (from 0)."""
        return list(self._cached(epoch))

    def __getitem__(self, position: int) -> int:
        if position < 0:
            raise IndexError(f"position {position} is negative")
        return self._cached(position // self.num_items)[position % self.num_items]

    def _shuffle(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self.num_items, generator=generator).tolist()


def context_part(batch: PackedBatch, rank: int, size: int) -> PackedBatch:
    """The tokens of one context-parallel rank, in the order that Megatron's packed attention and RoPE expect.

    Every sequence is cut into 2 * size chunks; rank r holds chunks r and 2 * size - 1 - r, so causal work is even.

    Args:
        batch: a row whose sequences all have a length that 2 * size divides (`PackedDataset(align=2 * size)`).

    Returns:
        The row with S / size tokens; `cu_seqlens` and `max_seqlen` still describe the whole sequences.
    """
    if size == 1:
        return batch
    index_T = local_places(batch.cu_seqlens, rank, size)
    parts = {
        name: value[:, index_T]
        for name, value in vars(batch).items()
        if isinstance(value, Tensor) and name != "cu_seqlens"
    }
    return replace(batch, **parts)


def local_places(cu_seqlens: Tensor, rank: int, size: int) -> Tensor:
    """Places in the whole row of the tokens that a rank holds, in its order: int64 [S / size]."""
    ends = cu_seqlens.tolist()
    places = []
    for start, end in zip(ends, ends[1:]):
        chunk, rest = divmod(end - start, 2 * size)
        if rest:
            raise ValueError(f"a sequence of {end - start} tokens cannot be cut into {2 * size} equal chunks")
        for part in (rank, 2 * size - 1 - rank):
            places.append(torch.arange(start + part * chunk, start + (part + 1) * chunk))
    return torch.cat(places)
