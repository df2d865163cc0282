"""A shuffled, endless walk over n items whose state is one integer."""

from __future__ import annotations

from functools import lru_cache

import torch


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
