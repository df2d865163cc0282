"""The 128 bytes that describe a tensor to Hopper's copy engine. Their layout is our own; `fake_cuda.cpp` writes it."""

from __future__ import annotations

import numpy as np

from .memory import MemoryFault

MAGIC = 0x5A454441
FIELDS = np.dtype(
    [
        ("magic", "u4"),
        ("rank", "u4"),
        ("element", "u4"),
        ("swizzle", "u4"),
        ("address", "u8"),
        ("dims", "u4", 5),
        ("box", "u4", 5),
        ("strides", "u8", 4),
        ("padding", "u1", 32),
    ]
)
"""`element`: bytes. `swizzle`: address bits mixed, 0 to 3. `strides`: bytes, of all dimensions but the first."""


class TensorMap:
    """A view of one descriptor. Made for a copy, it keeps what the bytes said then."""

    def __init__(self, raw: np.ndarray):
        self._raw = raw.view(FIELDS)[0:1]
        if self._raw["magic"][0] != MAGIC:
            raise MemoryFault("a tensor map that nobody encoded")
        self._now = self._raw.copy()[0]
        rank = int(self._now["rank"])
        self.dims = [int(x) for x in self._now["dims"][:rank]]
        self.box = [int(x) for x in self._now["box"][:rank]]
        self.strides = [int(self._now["element"]), *(int(x) for x in self._now["strides"][: rank - 1])]
        self.element, self.address = self.strides[0], int(self._now["address"])
        self.box_bytes = int(np.prod(self.box)) * self.element

    def replace(self, field: str, index: int, value: int) -> None:
        name = {"global_address": "address", "global_dim": "dims", "global_stride": "strides"}[field]
        if name == "address":
            if value % 16:
                raise MemoryFault(f"a tensor at {value:#x}, which is not a multiple of 16")
            self._raw["address"][0] = value
        else:
            if name == "strides" and value % 16:
                raise MemoryFault(f"a stride of {value} bytes, which is not a multiple of 16")
            self._raw[name][0][index] = value

    def _elements(self, corner: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Byte address of every element of the box, innermost first, and whether it lies in the tensor."""
        at, inside = np.full(1, self.address, np.int64), np.ones(1, bool)
        for start, length, size, stride in zip(corner, self.box, self.dims, self.strides):
            index = start + np.arange(length, dtype=np.int64)
            at = (index[:, None] * stride + at[None, :]).reshape(-1)
            inside = ((index >= 0) & (index < size))[:, None] & inside[None, :]
            inside = inside.reshape(-1)
        return at, inside

    def load(self, memory, corner: list[int]) -> np.ndarray:
        """The bytes of a box; zeros outside the tensor."""
        at, inside = self._elements(corner)
        values = np.zeros(at.size, f"u{self.element}")
        if inside.any():
            values[inside] = memory.load(at[inside], self.element)
        return values.view(np.uint8)

    def store(self, memory, corner: list[int], raw: np.ndarray) -> None:
        at, inside = self._elements(corner)
        if inside.any():
            memory.store(at[inside], np.ascontiguousarray(raw).view(f"u{self.element}")[inside])

    def swizzled(self, start: int, size: int) -> np.ndarray:
        """Where byte i of a box lies, relative to its start at the shared address `start`."""
        start &= 0xFFFFFF
        at = start + np.arange(size)
        return (at ^ ((at >> 7 & ((1 << int(self._now["swizzle"])) - 1)) << 4)) - start
