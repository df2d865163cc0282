"""What accesses cost on a GPU, counted from their addresses: turns of the shared banks, sectors of global memory."""

from __future__ import annotations

from collections import Counter

import numpy as np

BANKS, WORD, SECTOR = 32, 4, 32


class Traffic:
    """Give `see` to a machine as its `observe`."""

    def __init__(self):
        self.turns: Counter = Counter()
        """Turns that shared accesses took, by opcode."""
        self.least: Counter = Counter()
        """Turns they would take without bank conflicts."""
        self.sectors: Counter = Counter()
        """Sectors of 32 bytes that global accesses touched, by opcode."""
        self.bytes: Counter = Counter()

    def see(self, opcode: str, addresses: np.ndarray, size: int) -> None:
        if ".shared" in opcode:
            lanes = 128 // max(
                size, WORD
            )  # a turn serves 128 bytes: a quarter of the warp at 16 bytes a lane
            for first in range(0, len(addresses), lanes):
                self.turns[opcode] += self._most(addresses[first : first + lanes], size)
                self.least[opcode] += 1
        elif ".global" in opcode:
            span = np.arange(0, size, min(size, SECTOR))
            self.sectors[opcode] += len(set(((addresses[:, None] + span) // SECTOR).reshape(-1).tolist()))
            self.bytes[opcode] += size * len(addresses)

    @staticmethod
    def _most(addresses: np.ndarray, size: int) -> int:
        words = (addresses[:, None] // WORD + np.arange(max(1, size // WORD))).reshape(-1)
        return max(Counter(word % BANKS for word in set(words.tolist())).values())
