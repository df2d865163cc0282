"""Hopper's products of warpgroups. The accumulators cannot be read before the product is waited for, and the operands
are read at once or, as likely, only then.
"""

from __future__ import annotations

import numpy as np

from .access import one
from .convert import half_values
from .memory import MemoryFault
from .module import Instruction, Kernel
from .values import LANES, getter
from .warp import STALL

_SWIZZLE = {0: 0, 1: 3, 2: 2, 3: 1}
"""Address bits that a descriptor's layout type mixes: 1 is 128 bytes, 2 is 64, 3 is 32."""


def operand_offsets(descriptor: int, rows: int, transposed: bool) -> np.ndarray:
    """[rows, 16] shared addresses of a wgmma operand's 2-byte elements: rows along M or N, columns along K.

    The canonical layouts of the PTX manual, section on wgmma's shared memory layouts.
    """
    start = (descriptor & 0x3FFF) << 4
    leading, stride = (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    mode = _SWIZZLE[descriptor >> 62]
    if descriptor >> 49 & 7:
        raise NotImplementedError("a base offset in a matrix descriptor")
    r, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if mode == 0:
        at = r % 8 * 16 + r // 8 * stride + k // 8 * leading + k % 8 * 2
        if transposed:
            at = r % 8 * 2 + r // 8 * stride + k % 8 * 16 + k // 8 * leading
    elif transposed:
        width = 8 << mode  # elements of a swizzled row
        at = r % width * 2 + r // width * leading + k % 8 * width * 2 + k // 8 * stride
    else:
        at = r % 8 * (16 << mode) + r // 8 * stride + k * 2
    at = at + start
    return at ^ ((at >> 7 & ((1 << mode) - 1)) << 4)


def _wgmma(kernel: Kernel, inst: Instruction):
    action = inst.parts[1]
    if action == "fence":
        return lambda warp, mask: None
    if action == "commit_group":
        return lambda warp, mask: warp.state.setdefault("wgmma", [[]]).append([])
    if action == "wait_group":
        most = getter(kernel, inst.operands[0], "u32")

        def wait(warp, mask):
            groups = warp.state.setdefault("wgmma", [[]])
            keep = one(most, warp, mask)
            while len(groups) - 1 > keep:
                if not all(product.complete() for product in groups[0]):
                    warp.failed()
                    return STALL
                for product in groups.pop(0):
                    product.write(warp)
            return None

        return wait
    return _product(kernel, inst)


def _product(kernel: Kernel, inst: Instruction):
    shape, kind = inst.parts[4], inst.parts[6]
    columns = int(shape.split("n")[1].split("k")[0])
    if (
        not shape.startswith("m64")
        or not shape.endswith("k16")
        or inst.parts[5] != "f32"
        or kind not in ("bf16", "f16")
    ):
        raise NotImplementedError(inst.text)
    out, first, second, scale, negate_a, negate_b, *transposes = inst.operands
    slots = [each.slot for each in out]
    a, b, add = getter(kernel, first, "u64"), getter(kernel, second, "u64"), getter(kernel, scale, "pred")
    if (negate_a.value, negate_b.value) != (1, 1):
        raise NotImplementedError(inst.text)
    flip_a, flip_b = (bool(each.value) for each in transposes)

    def issue(warp, mask):
        base = warp.block.shared.base & 0xFFFFFF
        quarter = 16 * (warp.index % 4)
        at_a = operand_offsets(one(a, warp, mask), 64, flip_a)[quarter : quarter + 16] - base
        at_b = operand_offsets(one(b, warp, mask), columns, flip_b) - base
        number = warp.state["products"] = warp.state.get("products", 0) + 1
        products = warp.block.barriers.setdefault("products", {})
        product = products.setdefault((warp.index // 4, number), Product(warp.block.shared, kind))
        product.add(warp, slots, at_a, at_b, bool(add(warp)[0]))
        warp.block.grid.events += 1
        warp.state.setdefault("wgmma", [[]])[-1].append(product)

    return issue


class Product:
    """One wgmma of a warpgroup: complete no earlier than all four warps have issued it, and then for all of them."""

    def __init__(self, shared, kind: str):
        self.shared, self.kind = shared, kind
        self.parts: dict[int, dict] = {}

    def add(self, warp, slots: list[int], at_a: np.ndarray, at_b: np.ndarray, accumulate: bool) -> None:
        """A warp's quarter. The operands are read now or, as likely, when somebody waits."""
        for at in (at_a, at_b):
            if at.min() < 0 or at.max() + 2 > self.shared.size:
                raise MemoryFault("wgmma: an operand outside shared memory")
            self.shared.asynchronous(at, "wgmma")
        part = {"slots": slots, "at": (at_a, at_b), "accumulate": accumulate, "read": None}
        if warp.block.grid.random.random() < 0.5:
            self._read(part)
        self.parts[warp.index] = part
        key = ("accumulator", slots[0])
        if key not in warp.state:  # nobody may read the registers until the product is waited for
            warp.state[key] = [np.stack([warp.registers[slot] for slot in slots]), 0]
            for slot in slots:
                warp.registers[slot] = np.full(LANES, np.nan, np.float32)
        warp.state[key][1] += 1

    def _read(self, part: dict) -> None:
        part["read"] = [half_values(self.shared.views[2][at // 2], self.kind) for at in part["at"]]

    def complete(self) -> bool:
        """Whether it can be: then what has not been read is."""
        if len(self.parts) < 4:
            return False
        for part in self.parts.values():
            if part["read"] is None:
                self._read(part)
        return True

    def write(self, warp) -> None:
        """Let the warp have its quarter of the result."""
        part = self.parts[warp.index]
        slots, key = part["slots"], ("accumulator", part["slots"][0])
        kept = warp.state[key]
        left, right = part["read"]
        result = left @ right.T  # [16, N]
        kept[0] = _fragment(result + _matrix(kept[0]) if part["accumulate"] else result)
        kept[1] -= 1
        if kept[1] == 0:
            for slot, values in zip(slots, kept[0]):
                warp.registers[slot] = values
            del warp.state[key]


def _fragment(product: np.ndarray) -> np.ndarray:
    """[16, N] -> [N / 2, 32]: register i of lane l has row l/4 + 8 (i/2 % 2), column 8 (i/4) + 2 (l % 4) + i % 2."""
    blocks = product.reshape(2, 8, -1, 4, 2)  # half, l / 4, i / 4, l % 4, i % 2
    return np.ascontiguousarray(blocks.transpose(2, 0, 4, 1, 3).reshape(-1, LANES))


def _matrix(fragment: np.ndarray) -> np.ndarray:
    blocks = fragment.reshape(-1, 2, 2, 8, 4)
    return blocks.transpose(1, 3, 0, 4, 2).reshape(16, -1)


TABLE = {"wgmma": _wgmma}
