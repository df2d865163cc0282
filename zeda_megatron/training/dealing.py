"""Packed rows among ranks: data-parallel ranks take them in turn, context-parallel ones share each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from megatron.core import parallel_state

from ..data.context_part import context_part
from ..data.packing import PackedBatch

T = TypeVar("T")


def rank_part(rows: Sequence[T]) -> Sequence[T]:
    """What this data-parallel rank takes of all rows (or of their numbers)."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return rows[rank::size]


def split_over_context(rows: list[PackedBatch]) -> list[PackedBatch]:
    """This context-parallel rank's part of each row."""
    place = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    return [context_part(row, *place) for row in rows]


def filled_up(
    mine: list[PackedBatch], count: int, blank: PackedBatch, multiple: int = 1
) -> list[PackedBatch]:
    """This rank's rows of `count`, and blank ones up to what every rank has: experts are shared, so all must run
    equally often. That number is a multiple of `multiple`."""
    per_rank = -(-count // (parallel_state.get_data_parallel_world_size() * multiple)) * multiple
    return [*mine, *[blank] * (per_rank - len(mine))]
