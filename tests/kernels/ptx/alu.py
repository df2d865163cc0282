"""Arithmetic, shifts, comparisons, bits."""

from __future__ import annotations

import numpy as np

from .module import Instruction, Kernel
from .values import TYPES, getter, setter


def _wide(kind: str) -> str:
    return kind[0] + str(2 * int(kind[1:]))


def _shift(values, count, left: bool):
    size = values.dtype.itemsize * 8
    near = np.minimum(count, size - 1).astype(values.dtype)
    moved = values << near if left else values >> near
    beyond = np.zeros_like(values) if left or values.dtype.kind == "u" else values >> (size - 1)
    return np.where(count >= size, beyond, moved)


def _divide(a, b):
    """Toward zero, as integers are divided in C."""
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient += ((a % safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return quotient


def _multiply_high(a, b):
    return np.array([int(x) * int(y) >> (8 * a.dtype.itemsize) for x, y in zip(a, b)], a.dtype)


def _fused(a, b, c, down: bool):
    exact = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
    near = exact.astype(np.float32)
    return np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near) if down else near


_TWO = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "div": lambda a, b: a / b if a.dtype.kind == "f" else _divide(a, b),
    "rem": lambda a, b: a - _divide(a, b) * b,
    "min": np.minimum,
    "max": np.maximum,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
}
_ONE = {
    "neg": lambda a: -a,
    "abs": np.abs,
    "not": lambda a: ~a,
    "rcp": lambda a: np.float32(1) / a,
    "ex2": np.exp2,
    "popc": lambda a: np.array([int(x).bit_count() for x in a], np.uint32),
    "brev": lambda a: np.array([int(f"{int(x):032b}"[::-1], 2) for x in a], np.uint32),
    "clz": lambda a: np.array([32 - int(x).bit_length() for x in a], np.uint32),
}
_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def _two(kernel: Kernel, inst: Instruction):
    kind, act = inst.parts[-1], _TWO[inst.parts[0]]
    out, *sources = inst.operands
    a, b = (getter(kernel, source, kind) for source in sources)
    put = setter(kernel, out, kind)
    return lambda warp, mask: put(warp, mask, act(a(warp), b(warp)))


def _one(kernel: Kernel, inst: Instruction):
    root, kind = inst.parts[0], inst.parts[-1]
    out, source = inst.operands
    a, put, act = (
        getter(kernel, source, kind),
        setter(kernel, out, "u32" if root == "popc" else kind),
        _ONE[root],
    )
    return lambda warp, mask: put(warp, mask, act(a(warp)))


def _mul(kernel: Kernel, inst: Instruction):
    parts, kind = inst.parts[1:], inst.parts[-1]
    out, *sources = inst.operands
    if kind[0] == "f" or "lo" in parts:
        a, b = (getter(kernel, source, kind) for source in sources)
        put = setter(kernel, out, kind)
        return lambda warp, mask: put(warp, mask, a(warp) * b(warp))
    a, b = (getter(kernel, source, kind) for source in sources)
    if "hi" in parts:
        put = setter(kernel, out, kind)
        return lambda warp, mask: put(warp, mask, _multiply_high(a(warp), b(warp)))
    wide, put = TYPES[_wide(kind)], setter(kernel, out, _wide(kind))
    return lambda warp, mask: put(warp, mask, a(warp).astype(wide) * b(warp).astype(wide))


def _mad(kernel: Kernel, inst: Instruction):
    parts, kind = inst.parts[1:], inst.parts[-1]
    out, x, y, z = inst.operands
    if "wide" in parts:
        wide = _wide(kind)
        a, b, c = getter(kernel, x, kind), getter(kernel, y, kind), getter(kernel, z, wide)
        put, dtype = setter(kernel, out, wide), TYPES[wide]
        return lambda warp, mask: put(warp, mask, a(warp).astype(dtype) * b(warp).astype(dtype) + c(warp))
    a, b, c = (getter(kernel, each, kind) for each in (x, y, z))
    put = setter(kernel, out, kind)
    return lambda warp, mask: put(warp, mask, a(warp) * b(warp) + c(warp))


def _fma(kernel: Kernel, inst: Instruction):
    parts, kind = inst.parts[1:], inst.parts[-1]
    out, *sources = inst.operands
    a, b, c = (getter(kernel, source, kind) for source in sources)
    put, down = setter(kernel, out, kind), "rm" in parts
    return lambda warp, mask: put(warp, mask, _fused(a(warp), b(warp), c(warp), down))


def _shifts(left: bool):
    def compile_shift(kernel: Kernel, inst: Instruction):
        kind = inst.parts[-1]
        out, x, y = inst.operands
        a, count, put = getter(kernel, x, kind), getter(kernel, y, "u32"), setter(kernel, out, kind)
        return lambda warp, mask: put(warp, mask, _shift(a(warp), count(warp), left))

    return compile_shift


def _setp(kernel: Kernel, inst: Instruction):
    parts, kind = inst.parts[1:], inst.parts[-1]
    out, x, y, *more = inst.operands
    a, b, act = getter(kernel, x, kind), getter(kernel, y, kind), _COMPARE[parts[0]]
    if isinstance(out, tuple) or more:
        raise NotImplementedError(inst.text)
    put = setter(kernel, out, "pred")
    return lambda warp, mask: put(warp, mask, act(a(warp), b(warp)))


def _selp(kernel: Kernel, inst: Instruction):
    kind = inst.parts[-1]
    out, x, y, p = inst.operands
    a, b, chosen = getter(kernel, x, kind), getter(kernel, y, kind), getter(kernel, p, "pred")
    put = setter(kernel, out, kind)
    return lambda warp, mask: put(warp, mask, np.where(chosen(warp), a(warp), b(warp)))


def _bfi(kernel: Kernel, inst: Instruction):
    kind = inst.parts[-1]
    out, x, y, p, n = inst.operands
    a, b = getter(kernel, x, kind), getter(kernel, y, kind)
    position, length, put = getter(kernel, p, "u32"), getter(kernel, n, "u32"), setter(kernel, out, kind)

    def insert(warp, mask):
        one = TYPES[kind].type(1)
        field = (_shift(np.full(32, one), length(warp), True) - one) << position(warp)
        put(warp, mask, (b(warp) & ~field) | (a(warp) << position(warp) & field))

    return insert


def _bfind(kernel: Kernel, inst: Instruction):
    parts, kind = inst.parts[1:], inst.parts[-1]
    out, x = inst.operands
    a, put = getter(kernel, x, kind), setter(kernel, out, "u32")
    none = 0xFFFFFFFF

    def find(warp, mask):
        tops = [int(v).bit_length() for v in a(warp)]
        put(
            warp,
            mask,
            np.array([none if t == 0 else 32 - t if "shiftamt" in parts else t - 1 for t in tops], np.uint32),
        )

    return find


TABLE = {
    **dict.fromkeys(_TWO, _two),
    **dict.fromkeys(_ONE, _one),
    "mul": _mul,
    "mad": _mad,
    "fma": _fma,
    "shl": _shifts(True),
    "shr": _shifts(False),
    "setp": _setp,
    "selp": _selp,
    "bfi": _bfi,
    "bfind": _bfind,
}
