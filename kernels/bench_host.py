#!/usr/bin/env python
"""How long Python takes to launch an expert layer, with a library whose functions return at once.

    python kernels/bench_host.py [--experts 128] [--rows 64]

Needs a C compiler and no GPU. The least of many calls: what a busy machine adds is not Python's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zeda_kernels import cuda_kernels, experts, kernel_call, kernel_library
from zeda_kernels.expert_table import ExpertTable

HIDDEN, WIDTH = 64, 32
"""Small: no time depends on them."""


def stub(folder: Path) -> kernel_library.KernelLibrary:
    """A library with the C functions of the real one, which do nothing."""
    lines = [
        f"long {name}() {{ return {7 if name == 'zk_built' else 0}; }}" for name in kernel_library._SIGNATURES
    ]
    (folder / "stub.c").write_text("\n".join(lines))
    file = folder / "stub.so"
    subprocess.run(
        [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-o", file, folder / "stub.c"], check=True
    )
    return kernel_library.load(file)


def install(library: kernel_library.KernelLibrary) -> None:
    """Take CPU tensors for a GPU's, and the library for the built one."""
    stream = SimpleNamespace(cuda_stream=0)
    torch.cuda.current_device = lambda: None  # the index of a CPU tensor's device
    torch.cuda.current_stream = lambda device=None: stream
    for module in (cuda_kernels, kernel_call):
        module.built_library = lambda: library
    cuda_kernels.device_facts = lambda index: (90, 132)
    experts.rows_on = lambda x: cuda_kernels


def least_us(run, before=lambda: None, repeats: int = 300) -> float:
    """Least time of one call in microseconds, without what is done `before` each."""
    times = []
    for _ in range(repeats):
        before()
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times) * 1e6


class Nothing(torch.autograd.Function):
    """What autograd itself takes for as many weights."""

    @staticmethod
    def forward(ctx, x, fc1, fc2, *weights):
        ctx.tables = fc1, fc2
        return x * 1

    @staticmethod
    def backward(ctx, dout):
        return dout, None, None, *(grad for table in ctx.tables for grad in experts._unread(table))


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="bench_host.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--rows", type=int, default=64)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        install(stub(Path(folder)))
    for name, us in measure(args.experts, args.rows).items():
        print(f"{name:54} {us:8.1f} us")
    return 0


def measure(count: int, rows: int) -> dict[str, float]:
    """Microseconds of each part of a layer of `count` experts."""
    shapes = (2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)
    fc1, fc2 = (
        ExpertTable(torch.nn.Parameter(torch.zeros(*shape, dtype=torch.bfloat16)) for _ in range(count))
        for shape in shapes
    )
    for weight in (*fc1, *fc2):
        weight.main_grad = torch.zeros(weight.shape)
        weight.grad_added_to_main_grad = False
    x = torch.zeros(rows, HIDDEN, dtype=torch.bfloat16).requires_grad_()
    probs, ends = torch.ones(rows).requires_grad_(), torch.zeros(count, dtype=torch.int32)
    dout = torch.zeros(rows, HIDDEN, dtype=torch.bfloat16)

    weights = [*fc1, *fc2]

    def forward():
        with torch.no_grad():
            experts.mlp(x, probs, ends, fc1, fc2)

    def both():
        experts.mlp(x, probs, ends, fc1, fc2).backward(dout)

    def drop():  # as Megatron does, in a hook of each weight
        for weight in weights:
            weight.grad = None

    found = {
        "forward": least_us(forward),
        "forward and backward into main_grad": least_us(both, drop),
        "of which autograd, with a function that does nothing": least_us(
            lambda: Nothing.apply(x, fc1, fc2, *weights).backward(dout), drop
        ),
    }
    for weight in weights:
        weight.requires_grad_(False)
    found["forward and backward, experts frozen"] = least_us(both)
    return found


if __name__ == "__main__":
    sys.exit(main())
