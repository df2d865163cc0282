"""A launch: blocks and clusters whose warps take turns in an order drawn at random."""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass

import numpy as np

from .memory import FIRST, MemoryFault, SharedMemory
from .warp import Program, Warp


class Deadlock(Exception):
    """Every warp waits and nothing is under way."""


@dataclass(frozen=True)
class Launch:
    """What the host asks for."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    shared: int
    """Dynamic shared bytes."""


class Block:
    """A thread block: its shared memory, warps and barriers."""

    def __init__(self, grid: Grid, index: int, rank: int, position: tuple[int, int, int]):
        self.grid, self.index, self.rank, self.position = grid, index, rank, position
        self.shared = SharedMemory(rank, grid.shared_bytes)
        self.barriers: dict = {}
        """State of named barriers and of mbarriers, by name or offset."""
        threads = int(np.prod(grid.block))
        self.warps = [Warp(grid.program, self, i) for i in range(-(-threads // 32))]

    def special(self, name: str) -> int:
        root, _, axis = name[1:].partition(".")
        grid = self.grid
        if axis:
            i = "xyz".index(axis)
            inside = self.position[i] % grid.cluster[i]
            return {
                "ntid": grid.block[i],
                "nctaid": grid.size[i],
                "ctaid": self.position[i],
                "cluster_ctaid": inside,
                "cluster_nctaid": grid.cluster[i],
                "clusterid": self.position[i] // grid.cluster[i],
                "nclusterid": grid.size[i] // grid.cluster[i],
            }[root]
        return {
            "cluster_ctarank": self.rank,
            "cluster_nctarank": int(np.prod(grid.cluster)),
            "smid": self.index,
        }[root]

    def address_of(self, name: str) -> int:
        if name in self.grid.parameters:
            return self.grid.parameters[name]
        return self.shared.base + self.grid.symbols[name]

    @property
    def done(self) -> bool:
        return all(warp.done for warp in self.warps)


class Grid:
    """One launch of one kernel, run to its end by `run`."""

    def __init__(
        self,
        program: Program,
        launch: Launch,
        arguments: list[int],
        memory,
        seed: int,
        observe=None,
        starves=None,
    ):
        self.program, self.memory, self.random = program, memory, random.Random(seed)
        self.size, self.block, self.cluster = launch.grid, launch.block, launch.cluster
        self.observe = observe or (lambda opcode, addresses, size: None)
        """Told of every access of a warp's threads: the opcode, addresses of the active lanes, bytes of each."""
        self.starves = starves
        """Whether a warp is to run when no other can; copies land at once then. None: warps run and copies land at
        random."""
        self.events = 0
        """Counts everything that a waiting warp may wait for."""
        self.under_way: list = []
        """Asynchronous copies that have been issued: functions to call at some later time."""
        kernel = program.kernel
        self._buffer = (ctypes.c_uint8 * (kernel.parameter_bytes + 128))()
        base = -(-ctypes.addressof(self._buffer) // 128) * 128
        self.parameters = {}
        for (name, (offset, size)), source in zip(kernel.parameters.items(), arguments, strict=True):
            ctypes.memmove(base + offset, source, size)
            self.parameters[name] = base + offset
        self._block_of_parameters = (base, kernel.parameter_bytes)
        self.symbols, end = {}, 0
        for name, (align, size) in kernel.shared.items():
            end = -(-end // align) * align
            self.symbols[name], end = end, end + size
        end = -(-(end + FIRST) // 1024) * 1024 - FIRST if end else 0
        for inst in kernel.instructions:
            for operand in inst.operands:
                name = getattr(getattr(operand, "base", operand), "name", "")
                if name and name not in self.parameters and name not in self.symbols:
                    self.symbols[name] = end  # dynamic shared memory
        self.shared_bytes = end + launch.shared

    def run(self) -> None:
        """Run all blocks, cluster by cluster. Raises `MemoryFault` or `Deadlock`."""
        base, size = self._block_of_parameters
        self.memory.add(base, size, "the kernel's parameters", writable=False)
        counts = [n // c for n, c in zip(self.size, self.cluster)]
        try:
            for number in range(int(np.prod(counts))):
                self._run_cluster(number, counts)
        finally:
            self.memory.remove(base)

    def _run_cluster(self, number: int, counts: list[int]) -> None:
        corner = (number % counts[0], number // counts[0] % counts[1], number // (counts[0] * counts[1]))
        ranks = range(int(np.prod(self.cluster)))
        x, y, _ = self.cluster
        inside = [(r % x, r // x % y, r // (x * y)) for r in ranks]
        self.blocks = [
            Block(
                self,
                number * len(ranks) + r,
                r,
                tuple(c * n + i for c, n, i in zip(corner, self.cluster, inside[r])),
            )
            for r in ranks
        ]
        warps = [warp for block in self.blocks for warp in block.warps]
        while warps or self.under_way:
            ready = [warp for warp in warps if not warp.waiting]
            if self.under_way and (not ready or self.starves or self.random.random() < 0.1):
                self.under_way.pop(self.random.randrange(len(self.under_way)))()
                self.events += 1
                continue
            if not ready:
                raise Deadlock("\n".join(f"  {warp.where()}" for warp in warps))
            if self.starves:
                ready = [warp for warp in ready if not self.starves(warp)] or ready
            warp = self.random.choice(ready)
            warp.run(self.random.choice((1, 10, 100, 1000)))
            if warp.done:
                warps.remove(warp)
                self.events += 1

    def is_parameter(self, address: int) -> bool:
        base, size = self._block_of_parameters
        return base <= address < base + size

    def peer(self, rank: int, what: str) -> Block:
        """A block of this cluster that is still running."""
        if rank >= len(self.blocks):
            raise MemoryFault(f"{what}: no block {rank} in a cluster of {len(self.blocks)}")
        if self.blocks[rank].done:
            raise MemoryFault(f"{what}: block {rank} of the cluster has ended")
        return self.blocks[rank]
