"""Memory of the interpreted GPU: global memory is the host's, shared memory a poisoned array per thread block."""

from __future__ import annotations

import ctypes
from bisect import bisect_right

import numpy as np

GENERIC_SHARED = 0x7F << 56
"""Generic addresses of shared memory start here; global ones are the host's."""
RANK_SHIFT = 24
"""A shared address names the block of the cluster above this bit, as on Hopper."""
FIRST = 0x400
"""Offset of a block's first shared byte, as on Hopper."""
LIMIT = 227 * 1024
_ORIGIN = 64


def at_rank(address: int, rank: int) -> int:
    """The same place in the shared memory of another block of the cluster."""
    return address & ((1 << RANK_SHIFT) - 1) | rank << RANK_SHIFT


class MemoryFault(Exception):
    """An access that a GPU would fault on, or that depends on luck."""


class _Everything:
    """All memory but its first bytes as one array, for numpy: a null pointer would mean an array yet to be made."""

    def __init__(self, size: int):
        shape = ((1 << 47) // size,)
        self.__array_interface__ = {
            "data": (_ORIGIN, False),
            "shape": shape,
            "typestr": f"<u{size}",
            "version": 3,
        }


class GlobalMemory:
    """Host memory seen by address. Once a range was allowed, no other may be touched."""

    def __init__(self):
        self.guarded = False
        self.starts: list[int] = []
        self.ranges: dict[int, tuple[int, str, bool]] = {}
        self.views: dict[int, np.ndarray] = {}
        for size in (1, 2, 4, 8):
            self.views[size] = np.asarray(_Everything(size))

    def allow(self, start: int, size: int, name: str, writable: bool = True) -> None:
        """Let kernels read, and perhaps write, `size` bytes, and from now on nothing that was not allowed."""
        self.guarded = True
        self.add(start, size, name, writable)

    def add(self, start: int, size: int, name: str, writable: bool) -> None:
        if size:
            if start not in self.ranges:
                self.starts.insert(bisect_right(self.starts, start), start)
            self.ranges[start] = (size, name, writable)

    def remove(self, start: int) -> None:
        if self.ranges.pop(start, None):
            self.starts.remove(start)

    def clear(self) -> None:
        """Allow everything again."""
        self.starts, self.ranges, self.guarded = [], {}, False

    def check(self, first: int, last: int, write: bool) -> None:
        """Raise `MemoryFault` unless [first, last) lies in one range."""
        if not self.guarded:
            return
        at = bisect_right(self.starts, first) - 1
        start = self.starts[at] if at >= 0 else 0
        size, name, writable = self.ranges.get(start, (0, "nothing", True))
        if not start <= first <= last <= start + size:
            what = f"{'write to' if write else 'read of'} {last - first} bytes"
            raise MemoryFault(f"{what} at {name} + {first - start}, which has {size}")
        if write and not writable:
            raise MemoryFault(f"write to {name}, which is read-only")

    def check_lanes(self, addresses: np.ndarray, size: int, write: bool) -> None:
        low, high = int(addresses.min()), int(addresses.max()) + size
        try:
            self.check(low, high, write)
        except MemoryFault:
            for address in addresses:
                self.check(int(address), int(address) + size, write)

    def bytes_at(self, address: int, size: int, write: bool = False) -> np.ndarray:
        """A view of `size` bytes."""
        self.check(address, address + size, write)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Elements of `size` bytes at the int64 addresses."""
        self.check_lanes(addresses, size, False)
        return self.views[size][(addresses - _ORIGIN) // size]

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        size = values.dtype.itemsize
        self.check_lanes(addresses, size, True)
        self.views[size][(addresses - _ORIGIN) // size] = values.view(f"u{size}")


class SharedMemory:
    """One block's shared memory, NaN until something is written."""

    def __init__(self, rank: int, size: int):
        if size > LIMIT:
            raise MemoryFault(f"{size} bytes of shared memory; a block has {LIMIT}")
        self.base, self.size = (rank << RANK_SHIFT) + FIRST, size
        self.raw = np.full(-(-size // 16) * 16, 0xFF, np.uint8)
        self.views = {width: self.raw.view(f"u{width}") for width in (1, 2, 4, 8)}
        self.unfenced = np.zeros(self.raw.size, np.uint8)
        """1 where a thread wrote and no fence has shown it to the asynchronous proxy yet."""

    def offset(self, address: int, size: int) -> int:
        at = address - self.base
        if not 0 <= at <= self.size - size:
            raise MemoryFault(f"shared address {address:#x} of {size} bytes")
        return at

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        return self.views[size][self._at(addresses, size) // size]

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        size, at = values.dtype.itemsize, self._at(addresses, values.dtype.itemsize)
        self.views[size][at // size] = values.view(f"u{size}")
        for i in range(size):
            self.unfenced[at + i] = 1

    def _at(self, addresses: np.ndarray, size: int) -> np.ndarray:
        at = addresses - self.base
        if (at < 0).any() or (at > self.size - size).any():
            raise MemoryFault(f"shared addresses {[hex(a) for a in addresses]} of {size} bytes")
        if (at % size).any():
            raise MemoryFault(f"misaligned shared addresses {[hex(a) for a in addresses]} of {size} bytes")
        return at

    def asynchronous(self, at: np.ndarray | slice, what: str) -> None:
        """Raise unless the bytes may be read by the asynchronous proxy (wgmma, bulk copies)."""
        if self.unfenced[at].any():
            raise MemoryFault(f"{what} reads shared memory that no fence.proxy.async has shown it")
