"""Operands as numpy arrays of 32 lanes, and how results reach the registers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from .module import Constant, Kernel, Reg, Special, Symbol

LANES = 32
FULL = (1 << LANES) - 1
TYPES = {
    **{f"{c}{n}": np.dtype(f"{'i' if c == 's' else 'u'}{n // 8}") for c in "bus" for n in (8, 16, 32, 64)},
    **{"f32": np.dtype("f4"), "f64": np.dtype("f8"), "f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4")},
    **{"f16": np.dtype("u2"), "bf16": np.dtype("u2"), "pred": np.dtype(bool)},
}
"""Storage of each PTX type; a half is kept as its bits."""


@cache
def lanes(mask: int) -> np.ndarray:
    """The mask as 32 booleans."""
    return (mask >> np.arange(LANES) & 1).astype(bool)


def bits(flags: np.ndarray) -> int:
    """32 booleans as a mask."""
    return int(np.packbits(flags, bitorder="little").view(np.uint32)[0])


def cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The same bits where the sizes agree, else cut or extended as integers are."""
    if values.dtype == dtype:
        return values
    if "b" in (dtype.kind, values.dtype.kind):
        return values.astype(dtype)
    if values.dtype.itemsize == dtype.itemsize:
        return values.view(dtype)
    if values.dtype.kind == "f":
        values = values.view(f"u{values.dtype.itemsize}")
    whole = values.astype(f"{'i' if values.dtype.kind == 'i' else 'u'}{dtype.itemsize}")
    return whole.view(dtype)


def constant(operand: Constant, dtype: np.dtype) -> np.ndarray:
    if operand.bits_of:
        return cast(np.full(LANES, operand.value, f"u{operand.bits_of // 8}"), dtype)
    if dtype.kind == "b":
        return np.full(LANES, operand.value != 0)
    size = dtype.itemsize * 8
    return np.full(LANES, operand.value % (1 << size), f"u{size // 8}").view(dtype)


def getter(kernel: Kernel, operand, kind: str) -> Callable:
    """Function of the warp that gives the operand's 32 values."""
    dtype = TYPES[kind]
    if isinstance(operand, Reg):
        slot = operand.slot
        if TYPES[kernel.registers[slot]] == dtype:
            return lambda warp: warp.registers[slot]
        return lambda warp: cast(warp.registers[slot], dtype)
    if isinstance(operand, Constant):
        values = constant(operand, dtype)
        return lambda warp: values
    if isinstance(operand, Special):
        return lambda warp: cast(warp.special(operand.name), dtype)
    if isinstance(operand, Symbol):
        return lambda warp: cast(warp.address_of(operand.name), dtype)
    raise NotImplementedError(f"operand {operand}")


def setter(kernel: Kernel, operand, kind: str) -> Callable:
    """Function of the warp, a mask and 32 values that writes the lanes of the mask."""
    if operand is None:
        return lambda warp, mask, values: None
    slot, dtype = operand.slot, TYPES[kernel.registers[operand.slot]]

    def put(warp, mask, values):
        values = cast(values, dtype)
        if mask != FULL:
            values = np.where(lanes(mask), values, warp.registers[slot])
        warp.registers[slot] = values

    return put
