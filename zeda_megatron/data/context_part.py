"""A context-parallel rank's part of a packed row."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .packing import PackedBatch


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
