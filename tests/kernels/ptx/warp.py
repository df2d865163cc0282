"""A warp: 32 lanes that run in step until they branch apart, and meet again."""

from __future__ import annotations

import numpy as np

from .memory import GENERIC_SHARED, MemoryFault
from .module import Kernel
from .values import FULL, LANES, TYPES, bits

STALL = object()
"""What an instruction returns that must be tried again."""
YIELD = object()
"""What an instruction returns after which other warps should run."""


class Program:
    """A kernel whose instructions were turned into functions of warp and mask."""

    def __init__(self, kernel: Kernel, compile_one):
        self.kernel = kernel
        self.steps = [compile_one(kernel, inst) for inst in kernel.instructions]


class Warp:
    """Registers, position and pending work of 32 threads."""

    def __init__(self, program: Program, block, index: int):
        self.program, self.block, self.index = program, block, index
        self.registers = [np.zeros(LANES, TYPES[kind]) for kind in program.kernel.registers]
        for values, kind in zip(self.registers, program.kernel.registers):
            values[:] = True if kind == "pred" else np.frombuffer(b"\xff" * values.nbytes, values.dtype)
        self.fragments: dict[int, int] = {0: FULL}
        """Lanes by the position they wait at."""
        self.at = 0
        self.state: dict = {}
        """What instructions keep between calls: barriers they have arrived at, copies and products under way."""
        self.failed_at, self.failures = -1, 0
        thread = np.arange(LANES, dtype=np.uint32) + index * LANES
        x, y, _ = block.grid.block
        self.specials = {
            "%tid.x": thread % x,
            "%tid.y": thread // x % y,
            "%tid.z": thread // (x * y),
            "%laneid": thread % LANES,
            "%warpid": np.full(LANES, index, np.uint32),
        }

    @property
    def done(self) -> bool:
        return not self.fragments

    def special(self, name: str) -> np.ndarray:
        if name not in self.specials:
            self.specials[name] = np.full(LANES, self.block.special(name), np.uint32)
        return self.specials[name]

    def address_of(self, name: str) -> np.ndarray:
        key = "&" + name
        if key not in self.specials:
            self.specials[key] = np.full(LANES, self.block.address_of(name), np.uint64)
        return self.specials[key]

    @staticmethod
    def from_generic(addresses: np.ndarray) -> np.ndarray:
        return addresses - np.uint64(GENERIC_SHARED)

    @staticmethod
    def to_generic(addresses: np.ndarray) -> np.ndarray:
        return addresses + np.uint64(GENERIC_SHARED)

    def run(self, limit: int) -> None:
        """Run up to `limit` instructions, or until one must wait."""
        while limit and self.fragments:
            self.at = at = self._next()
            mask = self.fragments.pop(at)
            inst = self.program.kernel.instructions[at]
            if mask != FULL and "aligned" in inst.opcode:  # the other lanes are on their way
                self.failed()
                self._join(at, mask)
                return
            active = mask
            if inst.guard:
                slot, negate = inst.guard
                predicate = self.registers[slot]
                active = mask & bits(~predicate if negate else predicate)
            try:
                outcome = self.program.steps[at](self, active) if active or inst.opcode[:3] == "bra" else None
            except MemoryFault as fault:
                raise MemoryFault(f"{fault}\n  in {self.where(at)}") from None
            if outcome is STALL:
                self._join(at, mask)
                return
            limit -= 1
            if isinstance(outcome, int):  # a branch: where the active lanes go, -1 for the end
                if outcome >= 0:
                    self._join(outcome, active)
                if mask != active:
                    self._join(at + 1, mask & ~active)
            else:
                self._join(at + 1, mask)
            if outcome is YIELD:
                return

    def _next(self) -> int:
        """The lanes furthest behind go first, so that those ahead wait where paths meet. Lanes that wait for
        something give way to the others."""
        if len(self.fragments) == 1:
            return next(iter(self.fragments))
        order = sorted(self.fragments)
        return order[self.failures % len(order)]

    def _join(self, at: int, mask: int) -> None:
        if mask:
            self.fragments[at] = self.fragments.get(at, 0) | mask

    def failed(self) -> None:
        """A wait found nothing: counted, so that a deadlock is seen."""
        events = self.block.grid.events
        self.failures = self.failures + 1 if self.failed_at == events else 1
        self.failed_at = events

    @property
    def waiting(self) -> bool:
        """Whether all its lanes wait for something that has not happened since they looked."""
        return self.failed_at == self.block.grid.events and self.failures > 2 * len(self.fragments)

    def where(self, at: int | None = None) -> str:
        at = self.at if at is None else at
        text = self.program.kernel.instructions[at].text[:120]
        return f"block {self.block.index}, warp {self.index}, instruction {at}: {text}"
