"""Loads and stores of threads."""

from __future__ import annotations

import numpy as np

from .memory import GENERIC_SHARED, RANK_SHIFT
from .module import Address, Instruction, Kernel, Reg
from .values import LANES, TYPES, getter, lanes, setter

SPACES = ("param", "global", "shared", "shared::cta", "shared::cluster", "local", "const")


def address(kernel: Kernel, operand: Address):
    """Function of the warp that gives 32 int64 addresses."""
    kind = "u32" if isinstance(operand.base, Reg) and kernel.registers[operand.base.slot] == "b32" else "u64"
    base = getter(kernel, operand.base, kind)
    return lambda warp: base(warp).astype(np.int64) + operand.offset


def one(function, warp, mask: int) -> int:
    """The value of the first active lane, for operands that are the same in all."""
    return int(function(warp)[(mask & -mask).bit_length() - 1])


def shared_of(warp, at: int, what: str):
    """The block whose shared memory holds an address."""
    rank = at >> RANK_SHIFT
    return warp.block if rank == warp.block.rank else warp.block.grid.peer(rank, what)


def _space(parts: list[str]) -> str:
    return next((part.split("::")[0] for part in parts if part in SPACES), "generic")


def _load(warp, space: str, at: np.ndarray, size: int) -> np.ndarray:
    if space == "generic":
        inside = at >= GENERIC_SHARED
        if inside.all():
            space, at = "shared", at - GENERIC_SHARED
        elif inside.any():
            raise NotImplementedError("generic addresses of two spaces in one warp")
    if space == "shared":
        return shared_of(warp, int(at[0]), "load").shared.load(at, size)
    return warp.block.grid.memory.load(at, size)


def _store(warp, space: str, at: np.ndarray, values: np.ndarray) -> None:
    if space == "generic" and (at >= GENERIC_SHARED).all():
        space, at = "shared", at - GENERIC_SHARED
    if space == "shared":
        shared_of(warp, int(at[0]), "store").shared.store(at, values)
        warp.state.setdefault("wrote", []).append((at, values.dtype.itemsize))
    else:
        warp.block.grid.memory.store(at, values)


def _ld(kernel: Kernel, inst: Instruction):
    kind, space, at = inst.parts[-1], _space(inst.parts), address(kernel, inst.operands[1])
    outs = inst.operands[0] if isinstance(inst.operands[0], tuple) else (inst.operands[0],)
    puts, dtype = [setter(kernel, out, kind) for out in outs], TYPES[kind]

    def load(warp, mask):
        where = at(warp)
        chosen = lanes(mask)
        warp.block.grid.observe(inst.opcode, where[chosen], len(puts) * dtype.itemsize)
        for i, put in enumerate(puts):
            values = np.zeros(LANES, dtype)
            values[chosen] = _load(warp, space, where[chosen] + i * dtype.itemsize, dtype.itemsize).view(
                dtype
            )
            put(warp, mask, values)

    return load


def _st(kernel: Kernel, inst: Instruction):
    kind, space, at = inst.parts[-1], _space(inst.parts), address(kernel, inst.operands[0])
    sources = inst.operands[1] if isinstance(inst.operands[1], tuple) else (inst.operands[1],)
    gets, size = [getter(kernel, source, kind) for source in sources], TYPES[kind].itemsize

    def store(warp, mask):
        chosen = lanes(mask)
        where = at(warp)[chosen]
        warp.block.grid.observe(inst.opcode, where, len(gets) * size)
        for i, get in enumerate(gets):
            _store(warp, space, where + i * size, get(warp)[chosen])

    return store


TABLE = {"ld": _ld, "ldu": _ld, "st": _st}
"""Builders by the first part of the opcode: each makes a function (warp, mask) of an instruction."""
