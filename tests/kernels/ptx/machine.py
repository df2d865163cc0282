"""The whole machine: a library compiled by nvcc, its host code run as it is, its kernels interpreted."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np

from . import access, alu, ampere, bulk, convert, exchange, mbarrier, parse, wgmma
from .grid import Grid, Launch
from .memory import GlobalMemory
from .module import Instruction, Kernel
from .warp import Program

_ON_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_void_p),
)
HERE = Path(__file__).parent
_BUILDERS = {
    root: build
    for part in (access, alu, ampere, bulk, convert, exchange, mbarrier, wgmma)
    for root, build in part.TABLE.items()
}


def compile_one(kernel: Kernel, inst: Instruction):
    """An instruction as a function (warp, mask); one that nobody knows fails when it is reached."""
    if inst.parts[0] in _BUILDERS:
        return _BUILDERS[inst.parts[0]](kernel, inst)

    def unknown(warp, mask):
        raise NotImplementedError(f"{inst.text} in {warp.where()}")

    return unknown


def read_kernels(ptx: list[Path]) -> dict[str, Kernel]:
    """All kernels of some PTX files by name."""
    return {name: kernel for path in ptx for name, kernel in parse.read(path.read_text()).items()}


def link(output: Path, nvcc: str, units: dict[str, list[str]], archs: list[str]) -> Path:
    """Compile units, each in a folder beside `output` where its PTX stays, and link them with the stand-in runtime."""
    objects = []
    for name, line in units.items():
        folder = output.parent / name
        folder.mkdir(parents=True)
        objects.append(str(folder / f"{name}.o"))
        _run([*line, "--keep", "-o", objects[-1]], folder)
    _run(
        [nvcc, "-std=c++17", "-Xcompiler=-fPIC", "-c", str(HERE / "fake_cuda.cpp"), "-o", "fake_cuda.o"],
        output.parent,
    )
    _run([nvcc, "-shared", "-cudart=none", *archs, "-o", str(output), *objects, "fake_cuda.o"], output.parent)
    return output


def _run(line: list[str], folder: Path) -> None:
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)}\n{done.stderr[-2000:]}")


class Machine:
    """Launches of a library, interpreted one after the other in the calling thread."""

    def __init__(self, functions: ctypes.CDLL, kernels: dict[str, Kernel], seed: int = 0):
        self.memory, self.kernels, self.seed = GlobalMemory(), kernels, seed
        self.programs: dict[str, Program] = {}
        self.launches: list[str] = []
        """Names of the kernels that ran."""
        self.observe = None
        """See `Grid.observe`."""
        self.starves = None
        """See `Grid.starves`."""
        self.error: BaseException | None = None
        self._callback = _ON_LAUNCH(self._launched)
        functions.zk_on_launch(self._callback)

    def check(self) -> None:
        """Raise what went wrong inside a launch."""
        if self.error:
            error, self.error = self.error, None
            raise error

    def _launched(self, name: bytes, sizes, shared: int, arguments) -> int:
        try:
            kernel = self.kernels[name.decode()]
            if kernel.name not in self.programs:
                self.programs[kernel.name] = Program(kernel, compile_one)
            launch = Launch(tuple(sizes[0:3]), tuple(sizes[3:6]), tuple(sizes[6:9]), shared)
            pointers = [arguments[i] for i in range(len(kernel.parameters))]
            self.launches.append(kernel.name)
            self.seed += 1
            program, watch = self.programs[kernel.name], (self.observe, self.starves)
            with np.errstate(all="ignore"):
                Grid(program, launch, pointers, self.memory, self.seed, *watch).run()
            return 0
        except BaseException as error:
            self.error = self.error or error
            return 719  # cudaErrorLaunchFailure
