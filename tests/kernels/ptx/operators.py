"""`torch.ops.zeda` on the CPU with the GPU's implementation: its Python, its host code, and its kernels interpreted."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from zeda_kernels import build, cuda_kernels, expert_mlp, expert_ops, kernel_call, kernel_library, reference
from zeda_megatron.errors import UserError

from .machine import Machine, link, read_kernels
from .module import Kernel

SMS = 4
"""Multiprocessors that the machine claims: few, so that a block gets several tiles."""


def library(
    folder: Path, types: tuple[str, ...] = ("bf16",)
) -> tuple[kernel_library.KernelLibrary, dict[str, Kernel]]:
    """Build all kernels in `folder`; the library, and its kernels as PTX. Skips the test where they cannot be built."""
    options = replace(build.BuildOptions(), types=types)
    try:
        nvcc, headers = build.find_nvcc(), build.find_headers()
    except UserError as missing:
        pytest.skip(str(missing))
    flags = [flag for arch in options.archs for flag in build.TARGETS[arch]]
    made = link(folder / build.NAME, nvcc, build.commands(options, nvcc, headers), flags)
    ptx = [path for path in folder.rglob("*.ptx") if "compute_80" not in path.name]
    return kernel_library.load(made), read_kernels(ptx)


@contextmanager
def interpreted(made: kernel_library.KernelLibrary, machine: Machine, arch: int = 90) -> Iterator[None]:
    """Operators over bfloat16 and half run the kernels; those over float keep the reference.

    Kernels may touch the memory of tensors alone, and what torch.empty returns holds NaN.
    """

    def launch(x, name, *arguments):
        machine.memory.clear()
        for each in gc.get_objects():
            if type(each) in (torch.Tensor, torch.nn.Parameter):
                storage = each.untyped_storage()
                machine.memory.allow(storage.data_ptr(), storage.nbytes(), f"a tensor {tuple(each.shape)}")
        try:
            made.call(name, *arguments, None)
        finally:
            machine.check()

    override = torch.library.Library("zeda", "IMPL")
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # and so uninitialised memory is filled
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_kernels, "built_library", lambda: made)
            patch.setattr(cuda_kernels, "device_facts", lambda index: (arch, SMS))
            patch.setattr(cuda_kernels, "launch", launch)
            for name in expert_ops.SCHEMAS:
                override.impl(name, _by_type(name), "CPU", allow_override=True)
            yield
    finally:
        override._destroy()
        torch.use_deterministic_algorithms(deterministic)


def _by_type(name: str):
    composed = name in expert_ops.COMPOSED

    def of(rows):
        return expert_mlp.over(rows, name) if composed else getattr(rows, name)

    kernels, plain = of(cuda_kernels), of(reference)

    def run(*arguments):
        flat = [each for a in arguments for each in (a if isinstance(a, list | tuple) else (a,))]
        kinds = {each.dtype for each in flat if isinstance(each, torch.Tensor) and each.is_floating_point()}
        return (kernels if not kinds or kinds & set(kernel_call.TYPES) else plain)(*arguments)

    return run
