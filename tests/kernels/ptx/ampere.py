"""Ampere's instructions: matrix fragments to and from shared memory, their products, asynchronous copies."""

from __future__ import annotations

import numpy as np

from .access import address, one
from .convert import half_values
from .module import Instruction, Kernel
from .values import LANES, getter, lanes, setter


def _matrix_rows(at: np.ndarray, count: int) -> np.ndarray:
    """[count, 8, 8] addresses of 2-byte elements: lane 8 m + r names row r of matrix m."""
    return at[: 8 * count].reshape(count, 8, 1) + 2 * np.arange(8)


_LANE = np.arange(LANES)
_ROW, _COLUMN = _LANE // 4, _LANE % 4 * 2


def _ldmatrix(kernel: Kernel, inst: Instruction):
    count, transposed = int(next(p for p in inst.parts if p in ("x1", "x2", "x4"))[1]), "trans" in inst.parts
    puts, at = [setter(kernel, each, "b32") for each in inst.operands[0]], address(kernel, inst.operands[1])

    def load(warp, mask):
        elements = warp.block.shared.load(_matrix_rows(at(warp), count), 2).astype(np.uint32)
        if transposed:
            elements = elements.transpose(0, 2, 1)
        for i, put in enumerate(puts):
            put(warp, mask, elements[i][_ROW, _COLUMN] | elements[i][_ROW, _COLUMN + 1] << 16)

    return load


def _stmatrix(kernel: Kernel, inst: Instruction):
    count, transposed = int(next(p for p in inst.parts if p in ("x1", "x2", "x4"))[1]), "trans" in inst.parts
    at, gets = address(kernel, inst.operands[0]), [getter(kernel, each, "b32") for each in inst.operands[1]]

    def store(warp, mask):
        elements = np.zeros((count, 8, 8), np.uint16)
        for i, get in enumerate(gets):
            elements[i][_ROW, _COLUMN] = get(warp) & 0xFFFF
            elements[i][_ROW, _COLUMN + 1] = get(warp) >> 16
        if transposed:
            elements = elements.transpose(0, 2, 1)
        warp.block.grid.observe(inst.opcode, at(warp)[: 8 * count], 16)
        where = _matrix_rows(at(warp), count).reshape(-1)
        warp.block.shared.store(where, np.ascontiguousarray(elements).reshape(-1))
        warp.state.setdefault("wrote", []).append((where, 2))

    return store


def _pairs(values: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    return half_values((values & 0xFFFF).astype(np.uint16), kind), half_values(
        (values >> 16).astype(np.uint16), kind
    )


def _mma(kernel: Kernel, inst: Instruction):
    if inst.parts[3] != "m16n8k16" or inst.parts[4:6] != ["row", "col"] or inst.parts[6] != "f32":
        raise NotImplementedError(inst.text)
    kind = inst.parts[7]
    out, a, b, c = inst.operands
    puts, adds = [setter(kernel, each, "f32") for each in out], [getter(kernel, each, "f32") for each in c]
    left, right = ([getter(kernel, each, "b32") for each in operand] for operand in (a, b))

    def multiply(warp, mask):
        rows, columns = np.zeros((16, 16), np.float32), np.zeros((8, 16), np.float32)
        for i, get in enumerate(left):
            for j, half in enumerate(_pairs(get(warp), kind)):
                rows[_ROW + 8 * (i % 2), _COLUMN + 8 * (i // 2) + j] = half
        for i, get in enumerate(right):
            for j, half in enumerate(_pairs(get(warp), kind)):
                columns[_ROW, _COLUMN + 8 * i + j] = half
        product = rows @ columns.T
        results = [product[_ROW + 8 * (i // 2), _COLUMN + i % 2] + add(warp) for i, add in enumerate(adds)]
        for put, values in zip(puts, results):
            put(warp, mask, values)

    return multiply


def copy_of_threads(kernel: Kernel, inst: Instruction):
    """Copies that happen when their group is waited for."""
    if "commit_group" in inst.parts:
        return lambda warp, mask: warp.state.setdefault("copies", [[]]).append([])
    if "wait_group" in inst.parts or "wait_all" in inst.parts:
        most = getter(kernel, inst.operands[0], "u32") if inst.operands else None

        def wait(warp, mask):
            groups = warp.state.setdefault("copies", [[]])
            keep = one(most, warp, mask) if most else -1
            while len(groups) - 1 > keep:
                for copy in groups.pop(0):
                    copy()
            if not groups:
                groups.append([])

        return wait
    to, source, size, *more = inst.operands
    dst, src, taken = (
        address(kernel, to),
        address(kernel, source),
        getter(kernel, more[0], "u32") if more else None,
    )
    whole = size.value

    def copy(warp, mask):
        chosen = lanes(mask)
        where, here = dst(warp)[chosen], src(warp)[chosen]
        sizes = taken(warp)[chosen] if taken else np.full(len(here), whole)
        shared, memory = warp.block.shared, warp.block.grid.memory

        def move():
            for start, at, count in zip(where, here, sizes):
                offset = shared.offset(int(start), whole)
                shared.raw[offset : offset + whole] = 0
                if count:
                    shared.raw[offset : offset + int(count)] = memory.bytes_at(int(at), int(count))

        warp.state.setdefault("copies", [[]])[-1].append(move)

    return copy


TABLE = {"ldmatrix": _ldmatrix, "stmatrix": _stmatrix, "mma": _mma}
