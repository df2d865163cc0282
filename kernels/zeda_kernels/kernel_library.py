"""Finds and loads the library of CUDA kernels: its C functions with their argument types."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from zeda_megatron.errors import UserError

from .build import NAME, BuildOptions, build, cache_path

_I, _L, _P, _F = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
_SIGNATURES = {
    "zk_built": (_I, ()),
    "zk_probe": (_I, ()),
    "zk_grouped_workspace": (_L, (_I, _I, _I, _I, _L, _I, _I, _I)),
    "zk_grouped": (_I, (*[_I] * 4, _L, _I, _I, _P, _P, _P, _P, _P, _F, _P, _L, _I, _P)),
    "zk_maps": (_I, (*[_I] * 4, _P, _P)),
    "zk_rows": (_I, (*[_I] * 5, _L, _I, _I, *[_P] * 8, _I, _P)),
    "zk_tiles": (_I, (_I, _I)),
    "zk_swiglu": (_I, (_I, _I, _L, _I, _P, _P, _P, _P, _I, _P)),
    "zk_swiglu_grad": (_I, (_I, _I, _L, _I, _P, _P, _P, _P, _P, _P, _P, _I, _P)),
    "zk_zero_tail": (_I, (_I, _L, _L, _P, _P, _I, _P)),
}
"""Result and argument types of csrc/api.h. A test compares them with the header."""
_MEANINGS = {
    -1: "bad argument",
    -2: "workspace too small",
    -3: "rows must be multiples of 8 elements, tensors aligned to 16 bytes",
    35: "the driver is older than the CUDA runtime in the library: build it with an older nvcc, or renew the driver",
    100: "CUDA finds no device",
    -4: "not built for this GPU or type (ZEDA_KERNEL_ARCHS, ZEDA_KERNEL_TYPES)",
}


@dataclass(frozen=True)
class KernelLibrary:
    """The loaded library."""

    path: Path
    functions: ctypes.CDLL
    """Its C functions, typed. They take device pointers and wait for nothing."""

    @property
    def archs(self) -> tuple[int, ...]:
        """Architectures it holds kernels for: 80, 90."""
        built = self.functions.zk_built()
        return tuple(arch for bit, arch in ((1, 80), (2, 90)) if built & bit)

    @property
    def has_half(self) -> bool:
        return bool(self.functions.zk_built() & 4)

    def arch_for(self, capability: tuple[int, int]) -> int | None:
        """Whose kernels a GPU of this compute capability runs: 90 on Hopper, 80 on Ampere, Ada (8.x) and Blackwell's
        smaller ones (12.x), None on others: torch's product has kernels of their own for a B200 (10.x)."""
        if capability[0] == 9 and 90 in self.archs:
            return 90
        return 80 if capability[0] in (8, 12) and 80 in self.archs else None

    def why_not(self) -> str | None:
        """What keeps its CUDA runtime from working here, whatever the kernel; None if nothing."""
        code = self.functions.zk_probe()
        return f"{self.path}: {_meaning(code)}" if code else None

    def call(self, name: str, *arguments) -> None:
        """Call a C function. Raises RuntimeError with its code's meaning if it fails."""
        code = getattr(self.functions, name)(*arguments)
        if code:
            raise RuntimeError(f"{name}: {_meaning(code)}")


def _meaning(code: int) -> str:
    return _MEANINGS.get(code) or (f"CUDA error {code}" if code > 0 else f"CUTLASS status {-100 - code}")


def load(path: Path) -> KernelLibrary:
    """Load a library; needs no GPU. Raises `UserError` if the file is not one of ours."""
    try:
        functions = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(functions, name)
            function.restype, function.argtypes = result, list(arguments)
    except (OSError, AttributeError) as error:
        raise UserError(f"{path} is no library of these kernels: {error}; build it again") from None
    return KernelLibrary(path, functions)


def find() -> Path | None:
    """ZEDA_KERNELS_SO, else the package folder, else the build cache; None if there is none.

    With ZEDA_JIT_KERNELS=1 a missing library is built into the cache. Raises `UserError` if ZEDA_KERNELS_SO names
    no file, or if that build fails.
    """
    named = os.environ.get("ZEDA_KERNELS_SO")
    if named:
        if not Path(named).is_file():
            raise UserError(f"ZEDA_KERNELS_SO={named} does not exist")
        return Path(named)
    packaged = Path(__file__).with_name(NAME)
    if packaged.is_file():
        return packaged
    options = BuildOptions.from_environment()
    cached = cache_path(options)
    if cached.is_file():
        return cached
    return build(cached, options) if os.environ.get("ZEDA_JIT_KERNELS") == "1" else None


@cache
def library() -> KernelLibrary | None:
    """The library of this process, looked up once."""
    path = find()
    return load(path) if path else None
