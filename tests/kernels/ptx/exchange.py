"""What threads tell each other: branches apart, shuffles, votes, barriers of the block and of the cluster."""

from __future__ import annotations

import numpy as np

from .access import one
from .module import Instruction, Kernel
from .values import FULL, LANES, TYPES, bits, getter, setter
from .warp import STALL


def _shfl(kernel: Kernel, inst: Instruction):
    out, source, where, clamp, members = inst.operands
    out, inside = out if isinstance(out, tuple) else (out, None)
    get, amount, limit = (
        getter(kernel, source, "b32"),
        getter(kernel, where, "u32"),
        getter(kernel, clamp, "u32"),
    )
    put, tell, mode = setter(kernel, out, "b32"), setter(kernel, inside, "pred"), inst.parts[2]
    asked = getter(kernel, members, "u32")

    def shuffle(warp, mask):
        if not _gathered(warp, mask, asked):
            return STALL
        lane, by, c = np.arange(LANES), amount(warp).astype(np.int64) & 31, limit(warp).astype(np.int64)
        segment = c >> 8 & 31
        top, low = (lane & segment) | (c & 31 & ~segment), lane & segment
        source_lane = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": low | (by & ~segment)}[
            mode
        ]
        valid = source_lane >= top if mode == "up" else source_lane <= top
        put(warp, mask, get(warp)[np.where(valid, source_lane, lane)])
        if inside is not None:
            tell(warp, mask, valid)

    return shuffle


def _gathered(warp, mask: int, members) -> bool:
    """Whether all lanes that were asked for are here; else this one waits for them."""
    wanted = one(members, warp, mask)
    if mask & wanted == wanted:
        return True
    warp.failed()
    return False


def _vote(kernel: Kernel, inst: Instruction):
    out, source, members = inst.operands
    kind, mode = inst.parts[-1], inst.parts[2]
    get, put, asked = (
        getter(kernel, source, "pred"),
        setter(kernel, out, kind),
        getter(kernel, members, "u32"),
    )

    def vote(warp, mask):
        if not _gathered(warp, mask, asked):
            return STALL
        yes = bits(get(warp)) & mask
        value = {"ballot": yes, "any": yes != 0, "all": yes == mask}[mode]
        put(warp, mask, np.full(LANES, value, TYPES[kind]))

    return vote


def _elect(kernel: Kernel, inst: Instruction):
    (out, leader), members = inst.operands
    put, tell, asked = (
        setter(kernel, out, "b32"),
        setter(kernel, leader, "pred"),
        getter(kernel, members, "u32"),
    )

    def elect(warp, mask):
        if not _gathered(warp, mask, asked):
            return STALL
        first = (mask & -mask).bit_length() - 1
        put(warp, mask, np.full(LANES, first, np.uint32))
        tell(warp, mask, np.arange(LANES) == first)

    return elect


def _bar(kernel: Kernel, inst: Instruction):
    if inst.parts[1] == "warp":
        members = getter(kernel, inst.operands[0], "u32")
        return lambda warp, mask: None if _gathered(warp, mask, members) else STALL
    number = getter(kernel, inst.operands[0], "u32")
    threads = getter(kernel, inst.operands[1], "u32") if len(inst.operands) > 1 else None
    waits = inst.parts[1] != "arrive"

    def barrier(warp, mask):
        name = f"bar {one(number, warp, mask)}"
        need = one(threads, warp, mask) if threads else LANES * len(warp.block.warps)
        return meet(warp, mask, warp.block.barriers, name, need, waits)

    return barrier


def meet(warp, mask: int, barriers: dict, name: str, need: int, waits: bool):
    """Arrive at a counting barrier once, and stall until `need` threads have."""
    if mask != FULL:  # the other lanes are on their way
        warp.failed()
        return STALL
    phase, arrived = barriers.get(name, (0, 0))
    if name not in warp.state:
        warp.block.grid.events += 1
        arrived += LANES
        warp.state[name] = phase
        if arrived == need:
            phase, arrived = phase + 1, 0
        barriers[name] = (phase, arrived)
    if waits and warp.state[name] == phase:
        warp.failed()
        return STALL
    del warp.state[name]
    return None


def _cluster_barrier(kernel: Kernel, inst: Instruction):
    if inst.parts[1] != "cluster":
        raise NotImplementedError(inst.text)

    def barrier(warp, mask):
        grid = warp.block.grid
        need = LANES * sum(len(block.warps) for block in grid.blocks)
        barriers = grid.blocks[0].barriers
        if inst.parts[2] == "arrive":
            if meet(warp, mask, barriers, "cluster", need, waits=False) is STALL:
                return STALL
            warp.state["cluster phase"] = barriers["cluster"][0] - (barriers["cluster"][1] == 0)
            return None
        if barriers["cluster"][0] <= warp.state["cluster phase"]:
            warp.failed()
            return STALL
        return None

    return barrier


def _bra(kernel: Kernel, inst: Instruction):
    target = kernel.labels[inst.operands[0]]
    return lambda warp, mask: target


TABLE = {
    "shfl": _shfl,
    "vote": _vote,
    "elect": _elect,
    "bar": _bar,
    "barrier": _cluster_barrier,
    "bra": _bra,
    "ret": lambda kernel, inst: lambda warp, mask: -1,
    "exit": lambda kernel, inst: lambda warp, mask: -1,
}
