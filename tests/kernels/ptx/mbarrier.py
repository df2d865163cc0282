"""Hopper's barriers in shared memory, addresses of other blocks of the cluster, and fences."""

from __future__ import annotations

import numpy as np

from .access import address, shared_of
from .memory import MemoryFault
from .module import Instruction, Kernel
from .values import LANES, getter, lanes, setter
from .warp import YIELD


class Mbarrier:
    """Arrivals and bytes that a phase still waits for."""

    def __init__(self, count: int):
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def arrive(self, grid) -> None:
        if self.pending == 0:
            raise MemoryFault("an mbarrier gets more arrivals than it was made for")
        self.pending -= 1
        self._turn(grid)

    def expect(self, size: int, grid) -> None:
        self.bytes += size
        self._turn(grid)

    def _turn(self, grid) -> None:
        grid.events += 1
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


def barrier_at(warp, at: int, what: str) -> Mbarrier:
    block = shared_of(warp, at, what)
    offset = block.shared.offset(at, 8)
    if ("mbarrier", offset) not in block.barriers:
        raise MemoryFault(f"{what}: no mbarrier at {at:#x}")
    return block.barriers["mbarrier", offset]


def _mbarrier(kernel: Kernel, inst: Instruction):
    action = inst.parts[1]
    if action == "try_wait" or action == "test_wait":
        out, where, parity, *_ = inst.operands
        put, at, wanted = setter(kernel, out, "pred"), address(kernel, where), getter(kernel, parity, "u32")

        def wait(warp, mask):
            where, chosen = at(warp), lanes(mask)
            phases = np.zeros(LANES, np.uint32)
            for each in set(where[chosen].tolist()):
                phases[where == each] = barrier_at(warp, each, "mbarrier wait").phase & 1
            done = phases != wanted(warp)
            put(warp, mask, done)
            if done[chosen].all():
                return None
            warp.failed()
            return YIELD

        return wait
    operands = inst.operands[1:] if action == "arrive" else inst.operands
    at, value = (
        address(kernel, operands[0]),
        getter(kernel, operands[1], "u32") if len(operands) > 1 else None,
    )
    if action == "arrive" and "expect_tx" not in inst.parts and value is not None:
        raise NotImplementedError(inst.text)

    def act(warp, mask):
        grid = warp.block.grid
        for lane in np.flatnonzero(lanes(mask)):
            where = int(at(warp)[lane])
            if action == "init":
                offset = warp.block.shared.offset(where, 8)
                warp.block.barriers["mbarrier", offset] = Mbarrier(int(value(warp)[lane]))
                continue
            barrier = barrier_at(warp, where, f"mbarrier.{action}")
            if "expect_tx" in inst.parts:
                barrier.expect(int(value(warp)[lane]), grid)
            if action == "arrive":
                barrier.arrive(grid)

    return act


def _mapa(kernel: Kernel, inst: Instruction):
    out, source, rank = inst.operands
    at, to, put = getter(kernel, source, "u32"), getter(kernel, rank, "u32"), setter(kernel, out, "u32")
    return lambda warp, mask: put(warp, mask, (at(warp) & np.uint32(0xFFFFFF)) | to(warp) << np.uint32(24))


def _fence(kernel: Kernel, inst: Instruction):
    if "async" in inst.opcode:
        return lambda warp, mask: _show(warp)
    if "tensormap" in inst.opcode and "acquire" in inst.parts:
        at = address(kernel, inst.operands[0])
        return lambda warp, mask: warp.state.setdefault("acquired", set()).update(
            at(warp)[lanes(mask)].tolist()
        )
    return lambda warp, mask: None


def _show(warp) -> None:
    """Let the asynchronous proxy see what this warp wrote to shared memory."""
    for at, size in warp.state.pop("wrote", ()):
        for block in warp.block.grid.blocks:
            inside = at - block.shared.base
            inside = inside[(inside >= 0) & (inside < block.shared.size)]
            for i in range(size):
                block.shared.unfenced[inside + i] = 0


def _nothing(kernel: Kernel, inst: Instruction):
    return lambda warp, mask: None


TABLE = {
    "mbarrier": _mbarrier,
    "mapa": _mapa,
    "fence": _fence,
    "setmaxnreg": _nothing,
    "prefetch": _nothing,
    "griddepcontrol": _nothing,
    "membar": _nothing,
}
