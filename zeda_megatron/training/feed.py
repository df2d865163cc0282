"""Where the rows of a training step come from: stored rollouts (stage 1), or answers sampled a moment ago (stage 2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron.core import parallel_state

from ..data.packing import PackedBatch, PackedDataset
from ..data.rows import rank_part, split_over_context


@dataclass(frozen=True)
class StepRows:
    """What one optimizer step trains on, as seen by one data-parallel rank."""

    rows: list[PackedBatch]
    """Micro-batches; as many on every rank."""
    padding_factor: float = 1.0
    """Rows over rows with text, on all ranks: those of padding alone must not water down a mean over rows."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What is worth logging about them."""


class Feed(Protocol):
    """A source of rows whose state can be saved.

    Attributes:
        vocab_size: ids whose probabilities the loss compares; None is all that the model has.
        size: conversations or prompts that an epoch goes through.
    """

    vocab_size: int | None
    size: int

    def next_rows(self, step: int) -> StepRows:
        """Rows of the next step; `step` counts from 0."""
        ...

    def calibration_rows(self, count: int) -> list[PackedBatch]:
        """This rank's part of about `count` rows on which a threshold is set; changes no state."""
        ...

    def fingerprint(self) -> str:
        """Hash of everything that decides what is fed; a resumed run compares it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; equal on all ranks."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take that back."""
        ...


class StoredFeed:
    """Rows of packed rollouts, one global batch after the other."""

    vocab_size = None

    def __init__(self, dataset: PackedDataset, global_batch_size: int):
        self.dataset, self.global_batch_size = dataset, global_batch_size
        self.size = dataset.num_samples
        self.consumed_rows = 0

    def next_rows(self, step: int) -> StepRows:
        first = self.consumed_rows
        self.consumed_rows += self.global_batch_size
        return StepRows(self.rows_of_rank(rank_part(range(first, first + self.global_batch_size))))

    def calibration_rows(self, count: int) -> list[PackedBatch]:
        ranks = parallel_state.get_data_parallel_world_size()
        return self.rows_of_rank(rank_part(range(max(count // ranks, 1) * ranks)))

    def rows_of_rank(self, rows: Iterable[int]) -> list[PackedBatch]:
        """These rows, or this context-parallel rank's part of them."""
        return split_over_context([self.dataset[row] for row in rows])

    def fingerprint(self) -> str:
        return self.dataset.fingerprint()

    def state_dict(self) -> dict[str, Any]:
        return {"consumed_rows": self.consumed_rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.consumed_rows = state["consumed_rows"]
