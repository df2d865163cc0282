"""A KV cache whose rows begin at different times, so that a finished answer makes room for the next prompt.

All rows share one clock: column c of the cache holds what was computed at tick c, and a row that began at tick s
sees columns s, s+1, ... alone. Rotary embeddings depend on differences of positions only, so a row may begin at any
tick.

Columns may also be moved. Grouped-query attention caches keys before their rotation, and rotates them all by their
columns at every pass. Latent attention caches keys after it: a moved key keeps the position it was rotated for, and
`SlotContext.drift` tells the rotary embedding how far positions and columns are apart. As all columns move together,
one number is enough, and no key is rotated (and rounded) twice.

Linear attention has no columns: a row's recurrent state is that after its newest token, and a new prompt's takes its
place. The state of a free row means nothing.
"""

from __future__ import annotations

import torch
from megatron.core.inference.contexts import StaticInferenceContext


class SlotContext(StaticInferenceContext):
    """Megatron's cache of keys and values, with a rotary position for each column and recurrent states.

    Attributes:
        drift: rotary position of column 0, for keys that are cached after their rotation.
        recurrent_states: layer -> tensors [rows, ...] of `gated_delta.GatedDeltaNet`, after the newest token.
    """

    def __init__(self, rows: int, length: int, drift: int = 0):
        super().__init__(rows, length)
        self.drift = drift
        self.recurrent_states: dict[int, tuple[torch.Tensor, ...]] = {}


class KVSlots:
    """Cache of `slots` rows and `length` columns.

    Attributes:
        context: for the model's forward pass; writes at the clock.
        clock: columns in use.
        starts_B: first column of each row, int64 on the CPU. A free row sees its newest column alone.
    """

    def __init__(self, slots: int, length: int):
        self.context = SlotContext(slots, length)
        self.length, self.clock = length, 0
        self.starts_B = torch.zeros(slots, dtype=torch.int64)

    def prefill_context(self, rows: list[int], longest: int) -> SlotContext:
        """A cache for the prefill of prompts that `admit` will move into these free rows."""
        self.starts_B[torch.tensor(rows)] = self.clock
        if not self._seen():  # nobody remembers the past: positions begin anew
            self.context.drift = longest - self.clock
        # Moving columns changes no position, so the newest one has that of today's clock.
        return SlotContext(len(rows), longest, self.clock + self.context.drift - longest)

    def admit(self, rows: list[int], prefill: SlotContext, lengths: list[int]) -> None:
        """Move prompts from the cache of their prefill, where they end at the last column, into free rows."""
        longest, index = prefill.max_sequence_length, torch.tensor(rows)
        self.starts_B[index] = self.clock
        self._shift(max(longest, self._seen()))
        here = slice(self.clock - longest, self.clock)
        for layer, parts in prefill.key_value_memory_dict.items():
            for whole, part in zip(self._memory(layer, parts), parts, strict=True):
                whole[here, index.to(whole.device)] = part
        states = self.context.recurrent_states
        for layer, parts in prefill.recurrent_states.items():
            if layer not in states:
                slots = self.context.max_batch_size
                states[layer] = tuple(part.new_zeros(slots, *part.shape[1:]) for part in parts)
            for whole, part in zip(states[layer], parts, strict=True):
                whole[index.to(whole.device)] = part
        self.starts_B[index] = self.clock - torch.tensor(lengths)

    def next_column(self, free: list[int]) -> torch.Tensor | None:
        """Open a column for one token per row and point the context at it.

        Returns:
            What the new tokens must not see, bool [B, 1, 1, S] (True = hidden), or None if they may see all.
        """
        self.starts_B[free] = self.clock
        if self.clock == self.length:
            self._shift(self._seen())
        self.context.sequence_len_offset = self.clock
        self.context.enable_decode_mode()
        self.clock += 1
        if not self.starts_B.any():
            return None
        return (torch.arange(self.clock) < self.starts_B[:, None])[:, None, None]

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        index = torch.tensor(rows)
        self.context.max_batch_size = len(rows)
        memory = self.context.key_value_memory_dict
        for layer, parts in memory.items():  # one after the other: never two caches at a time
            memory[layer] = tuple(part[:, index.to(part.device)] for part in parts)
        states = self.context.recurrent_states
        for layer, parts in states.items():
            states[layer] = tuple(part[index.to(part.device)] for part in parts)
        self.starts_B = self.starts_B[index]

    def _seen(self) -> int:
        """Newest columns that some row still sees."""
        return self.clock - int(self.starts_B.min())

    def _shift(self, clock: int) -> None:
        """Move what is still seen, so that it ends at `clock`."""
        seen = self._seen()
        if clock != self.clock and seen:
            for parts in self.context.key_value_memory_dict.values():
                for part in parts:
                    part[clock - seen : clock] = part[self.clock - seen : self.clock].clone()
        self.starts_B += clock - self.clock
        self.context.drift -= clock - self.clock
        self.clock = clock

    def _memory(self, layer: int, like: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        memory = self.context.key_value_memory_dict
        if layer not in memory:
            slots = self.context.max_batch_size
            memory[layer] = tuple(part.new_zeros(self.length, slots, *part.shape[2:]) for part in like)
        return memory[layer]
