"""Moves and conversions between registers."""

from __future__ import annotations

import numpy as np

from .module import Instruction, Kernel
from .values import TYPES, getter, setter


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even."""
    raw = values.view(np.uint32)
    rounded = (raw + 0x7FFF + (raw >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def half_bits(values: np.ndarray, kind: str) -> np.ndarray:
    return _round_to_bfloat16(values) if kind == "bf16" else values.astype(np.float16).view(np.uint16)


def half_values(raw: np.ndarray, kind: str) -> np.ndarray:
    """Bits of bfloat16 or half as float32."""
    if kind == "bf16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.view(np.float16).astype(np.float32)


def _mov(kernel: Kernel, inst: Instruction):
    kind = inst.parts[-1]
    out, source = inst.operands
    if isinstance(out, tuple):  # unpack
        size = TYPES[kind].itemsize // len(out)
        a, puts = getter(kernel, source, kind), [setter(kernel, each, f"u{8 * size}") for each in out]

        def unpack(warp, mask):
            pieces = np.ascontiguousarray(a(warp)).view(f"u{size}").reshape(-1, len(puts))
            for i, put in enumerate(puts):
                put(warp, mask, pieces[:, i].copy())

        return unpack
    put = setter(kernel, out, kind)
    if isinstance(source, tuple):  # pack
        size = TYPES[kind].itemsize // len(source)
        pieces = [getter(kernel, each, f"u{8 * size}") for each in source]
        return lambda warp, mask: put(
            warp, mask, np.stack([piece(warp) for piece in pieces], 1).view(TYPES[kind])[:, 0]
        )
    a = getter(kernel, source, kind)
    return lambda warp, mask: put(warp, mask, a(warp))


def _cvt(kernel: Kernel, inst: Instruction):
    parts = inst.parts[1:]
    out, *sources = inst.operands
    into, given = parts[-2], parts[-1]
    if into in ("bf16x2", "f16x2"):
        high, low = (getter(kernel, source, given) for source in sources)
        put, half = setter(kernel, out, into), into.removesuffix("x2")

        def pack(warp, mask):
            upper = half_bits(high(warp), half).astype(np.uint32) << 16
            put(warp, mask, upper | half_bits(low(warp), half))

        return pack
    a, put, dtype = getter(kernel, sources[0], given), setter(kernel, out, into), TYPES[into]
    if into in ("bf16", "f16"):
        return lambda warp, mask: put(warp, mask, half_bits(a(warp), into))
    if given in ("bf16", "f16"):
        return lambda warp, mask: put(warp, mask, half_values(a(warp), given))
    if "sat" in parts:
        return lambda warp, mask: put(warp, mask, np.nan_to_num(np.clip(a(warp), 0, 1)).astype(dtype))
    if given[0] == "f" and into[0] != "f" and not {"rzi", "rni"} & set(parts):
        raise NotImplementedError(inst.text)
    if "rni" in parts:
        return lambda warp, mask: put(warp, mask, np.rint(a(warp)).astype(dtype))
    return lambda warp, mask: put(warp, mask, a(warp).astype(dtype))


def _cvta(kernel: Kernel, inst: Instruction):
    parts = inst.parts[1:]
    out, x = inst.operands
    a, put = getter(kernel, x, "u64"), setter(kernel, out, "u64")
    space = next((p for p in parts if p in ("shared", "local", "shared::cta")), None)
    to = "to" in parts
    if space is None:  # global, param and const are addresses of the host
        return lambda warp, mask: put(warp, mask, a(warp))
    return lambda warp, mask: put(warp, mask, warp.from_generic(a(warp)) if to else warp.to_generic(a(warp)))


TABLE = {"mov": _mov, "cvt": _cvt, "cvta": _cvta}
