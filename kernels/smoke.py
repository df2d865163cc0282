#!/usr/bin/env python
"""One call of every kernel, each in a process of its own and within a time limit: what runs, what is wrong, what hangs.

    python kernels/smoke.py [--limit 40] [--json FILE] [--device cpu]

Counts of 3, 0 and 130 rows, compared with float64. For the first minute on a new GPU: a kernel that hangs takes no
other with it. Exit code 1 unless all are right.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zeda_kernels import experts, kernel_call, reference

COUNTS, HIDDEN, WIDTH = [3, 0, 130], 264, 136
TILED = {"fc1", "act", "forward", "dgrad", "swiglu_dgrad"}
"""Kernels that have a small and a large tile."""


def inputs(device: str) -> dict:
    """Random tensors of a layer in bfloat16, with two rows that belong to no expert."""
    draw = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=draw) * 0.5).bfloat16().to(device)

    rows, count = sum(COUNTS) + 2, len(COUNTS)
    return {
        "x": made(rows, HIDDEN),
        "pre": made(rows, 2 * WIDTH),
        "dact": made(rows, WIDTH),
        "probs": torch.rand(rows, generator=draw).to(device),
        "ends": torch.tensor(COUNTS).cumsum(0).to(torch.int32).to(device),
        "fc1": [made(2 * WIDTH, HIDDEN) for _ in range(count)],
        "dout": made(rows, HIDDEN),
        "fc2": [made(HIDDEN, WIDTH) for _ in range(count)],
    }


def _wgrad(rows, i):
    dtype = rows.wide(i["x"].dtype)
    main = [torch.ones(2 * WIDTH, HIDDEN, dtype=dtype, device=i["x"].device) for _ in COUNTS]
    rows.grouped_wgrad_(main, i["pre"], i["x"], i["ends"], True)
    return torch.stack(main)


KERNELS = {
    "forward": lambda rows, i: rows.grouped_mm(i["x"], i["fc1"], i["ends"]),
    "dgrad": lambda rows, i: rows.grouped_dgrad(i["pre"], i["fc1"], i["ends"]),
    "fc1": lambda rows, i: torch.cat(rows.moe_fc1(i["x"], i["fc1"], i["probs"], i["ends"]), dim=1),
    "act": lambda rows, i: rows.moe_act(i["x"], i["fc1"], i["probs"], i["ends"]),
    "wgrad": _wgrad,
    "swiglu": lambda rows, i: rows.swiglu(i["pre"], i["probs"], i["ends"]),
    "swiglu_backward": lambda rows, i: rows.swiglu_backward(i["dact"], i["pre"], i["probs"], i["ends"])[0],
    "swiglu_dgrad": lambda rows, i: rows.swiglu_dgrad(i["dout"], i["fc2"], i["pre"], i["probs"], i["ends"])[
        0
    ],
}


def error_of(name: str, device: str) -> float:
    """Distance from float64's result, as a share of its norm."""
    here = inputs(device)
    exact = {
        key: [w.cpu().double() for w in value]
        if isinstance(value, list)
        else value.cpu().double()
        if value.is_floating_point()
        else value.cpu()
        for key, value in here.items()
    }
    with torch.no_grad():
        found, right = (
            KERNELS[name](experts.rows_on(here["x"]), here).cpu().double(),
            KERNELS[name](reference, exact),
        )
    return float((found - right).norm() / right.norm()) if found.isfinite().all() else float("inf")


def try_one(name: str, tile: str | None, device: str, limit: float) -> str:
    """`ok`, or what is wrong, of a kernel in a process of its own."""
    line = [sys.executable, __file__, "--one", name, "--device", device]
    here = os.environ | ({"ZEDA_KERNEL_TILE": tile} if tile else {})
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=limit, env=here)
    except subprocess.TimeoutExpired:
        return f"hangs: no answer in {limit:g} s"
    if done.returncode:
        return "fails: " + (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
    error = float(done.stdout.split()[-1])
    return "ok" if error < 1e-2 else f"wrong: {error:.1e} away from float64"


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit code 2 without the device."""
    parser = argparse.ArgumentParser(prog="smoke.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--limit", type=float, default=40.0, help="seconds for each kernel, start of Python included"
    )
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--one", choices=KERNELS, help="run this one here, and print its error")
    args = parser.parse_args(argv)
    if args.one:
        print(error_of(args.one, args.device))
        return 0
    if args.device == "cuda":
        missing = (
            "torch sees no CUDA device (--device cpu walks through)"
            if not torch.cuda.is_available()
            else kernel_call.why_not(torch.device("cuda", 0), torch.bfloat16)
        )
        if missing:
            print(f"error: {missing}", file=sys.stderr)
            return 2
    result = {}
    for name in KERNELS:
        for tile in ("small", "large") if name in TILED else (None,):
            key = f"{name} {tile}" if tile else name
            result[key] = try_one(name, tile, args.device, args.limit)
            print(f"{key:16} {result[key]}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(told == "ok" for told in result.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
