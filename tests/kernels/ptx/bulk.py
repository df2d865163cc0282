"""Hopper's copies of tensor boxes. One happens at a time drawn at random after it was asked for: a kernel that reads
the result or reuses the source too early fails.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from .access import address, one
from .ampere import copy_of_threads
from .mbarrier import barrier_at
from .memory import GENERIC_SHARED, RANK_SHIFT, MemoryFault, at_rank
from .module import Instruction, Kernel
from .tensor_map import TensorMap
from .values import getter, lanes
from .warp import STALL


def _map_at(warp, at: int) -> TensorMap:
    """The map at an address: a parameter of the kernel, or one that this warp has acquired since it was written."""
    grid = warp.block.grid
    if at % 64:
        raise MemoryFault(f"a tensor map at {at:#x}, which is not a multiple of 64")
    if not grid.is_parameter(at) and at not in warp.state.get("acquired", ()):
        raise MemoryFault("a tensor map in global memory that no fence.proxy.tensormap acquired")
    return TensorMap(grid.memory.bytes_at(at, 128))


def _tensormap(kernel: Kernel, inst: Instruction):
    if inst.parts[1] == "cp_fenceproxy":
        to, source = address(kernel, inst.operands[0]), address(kernel, inst.operands[1])

        def copy(warp, mask):
            at = warp.block.shared.offset(one(source, warp, mask), 128)
            memory, target = warp.block.grid.memory, one(to, warp, mask)
            memory.bytes_at(target, 128, write=True)[:] = warp.block.shared.raw[at : at + 128]
            for block in warp.block.grid.blocks:
                for each in block.warps:
                    each.state.get("acquired", set()).discard(target)

        return copy
    where, *index, value = inst.operands
    field, shared = inst.parts[3], "shared::cta" in inst.parts
    at, new = address(kernel, where), getter(kernel, value, "u64")
    number = getter(kernel, index[0], "u32") if index else None

    def replace(warp, mask):
        for lane in np.flatnonzero(lanes(mask)):
            here = int(at(warp)[lane])
            if shared:
                here = here - GENERIC_SHARED if here >= GENERIC_SHARED else here
                offset = warp.block.shared.offset(here, 128)
                raw = warp.block.shared.raw[offset : offset + 128]
            else:
                raw = warp.block.grid.memory.bytes_at(here, 128, write=True)
            TensorMap(raw).replace(field, int(number(warp)[lane]) if number else 0, int(new(warp)[lane]))

    return replace


def _bulk(kernel: Kernel, inst: Instruction):
    """cp.async.bulk: tensor boxes between global and shared memory, groups and waits."""
    parts = inst.parts
    if "commit_group" in parts:

        def commit(warp, mask):
            for lane in np.flatnonzero(lanes(mask)):
                groups = warp.state.setdefault(("bulk", lane), [[]])
                groups.append([])

        return commit
    if "wait_group" in parts:
        most = getter(kernel, inst.operands[0], "u32")

        def wait(warp, mask):
            for lane in np.flatnonzero(lanes(mask)):
                groups = warp.state.setdefault(("bulk", lane), [[]])
                ended = len(groups) - 1 - int(most(warp)[lane])
                if any(not copy["done"] for group in groups[: max(ended, 0)] for copy in group):
                    warp.failed()
                    return STALL
            return None

        return wait
    if "tensor" not in parts:
        raise NotImplementedError(inst.text)
    if parts.index("global") < min(i for i, p in enumerate(parts) if p.startswith("shared")):
        return _store_box(kernel, inst)
    return _load_box(kernel, inst)


def _coordinates(kernel, operand):
    return [getter(kernel, each, "s32") for each in operand.coordinates]


def _load_box(kernel: Kernel, inst: Instruction):
    to, source, barrier, *more = inst.operands
    where, signal, tensor = address(kernel, to), address(kernel, barrier), address(kernel, source)
    corner = _coordinates(kernel, source)
    multicast = getter(kernel, more[0], "u16") if "multicast::cluster" in inst.parts else None

    def load(warp, mask):
        for lane in np.flatnonzero(lanes(mask)):
            target, bar = int(where(warp)[lane]), int(signal(warp)[lane])
            to_all = int(multicast(warp)[lane]) if multicast else 1 << (target >> RANK_SHIFT)
            ranks = [rank for rank in range(16) if to_all >> rank & 1]
            box = _map_at(warp, int(tensor(warp)[lane])), [int(each(warp)[lane]) for each in corner]
            warp.block.grid.under_way.append(partial(_arrive, warp, *box, target, bar, ranks, warp.where()))

    return load


def _arrive(warp, tensor: TensorMap, corner: list[int], target: int, bar: int, ranks: list[int], place: str):
    """The box reaches the shared memory of every block, each of which is told at its own barrier."""
    grid = warp.block.grid
    values = tensor.load(grid.memory, corner)
    order = tensor.swizzled(target, values.size)
    for rank in ranks:
        peer = warp.block if rank == warp.block.rank else grid.peer(rank, f"bulk copy of {place}")
        peer.shared.raw[peer.shared.offset(at_rank(target, rank), values.size) + order] = values
        barrier_at(warp, at_rank(bar, rank), place).expect(-values.size, grid)


def _store_box(kernel: Kernel, inst: Instruction):
    to, source = inst.operands
    tensor, start, corner = address(kernel, to), address(kernel, source), _coordinates(kernel, to)

    def store(warp, mask):
        for lane in np.flatnonzero(lanes(mask)):
            box = _map_at(warp, int(tensor(warp)[lane])), [int(each(warp)[lane]) for each in corner]
            here, shared, copy = int(start(warp)[lane]), warp.block.shared, {"done": False}
            warp.state.setdefault(("bulk", lane), [[]])[-1].append(copy)
            span = box[0].swizzled(here, box[0].box_bytes) + shared.offset(here, box[0].box_bytes)
            # What threads wrote must be visible when the copy is asked for, not when it happens.
            shared.asynchronous(span, warp.where())
            warp.block.grid.under_way.append(partial(_depart, warp.block, *box, span, copy))

    return store


def _depart(block, tensor: TensorMap, corner: list[int], span: np.ndarray, copy: dict) -> None:
    tensor.store(block.grid.memory, corner, block.shared.raw[span])
    copy["done"] = True


def _copy(kernel: Kernel, inst: Instruction):
    return _bulk(kernel, inst) if inst.parts[2] == "bulk" else copy_of_threads(kernel, inst)


TABLE = {"cp": _copy, "tensormap": _tensormap}
