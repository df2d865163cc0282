#!/usr/bin/env python
"""Times the expert MLP of both models: own kernels, torch's grouped GEMM, Triton, Transformer Engine.

    python kernels/bench.py [--json FILE] [--tokens 8,64,...] [--zero-shares 0,.5] [--quick]

Random data, uniform routing; median of CUDA events after warming up. A back end that is not installed is left out and
named. `--device cpu --tiny` walks through the same code without a GPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_backends import Shape, backends

MODELS = {
    "qwen3_30b_a3b": Shape(experts=128, picks=8, hidden=2048, width=768),
    "glm_4_7_flash": Shape(experts=64, picks=4, hidden=2048, width=1536),
}
TINY = {"tiny": Shape(experts=5, picks=2, hidden=16, width=8)}
TOKENS = (8, 64, 512, 4096, 16384, 32768, 65536)
SHARES = (0.0, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Timing:
    """One row of the result."""

    model: str
    backend: str
    what: str
    """forward, dgrad or wgrad of fc1's product; fc1 (product and activation, both kept), act (the activation alone is
    kept); layer (nothing kept) or layer_backward (forward and backward)."""
    tokens: int
    zero_share: float
    rows: int
    microseconds: float
    tflops: float


def draw_counts(shape: Shape, tokens: int, share: float, seed: int) -> torch.Tensor:
    """Rows of each expert: each slot is a zero expert with probability `share`, else uniform."""
    generator = torch.Generator().manual_seed(seed)
    real = int((torch.rand(tokens * shape.picks, generator=generator) >= share).sum())
    ids = torch.randint(0, shape.experts, (real,), generator=generator)
    return torch.bincount(ids, minlength=shape.experts)


def median_us(run, device: str, repeats: int) -> float:
    """Median time of one call in microseconds."""
    for _ in range(3 if device == "cuda" else 1):
        run()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) * 1e3)
        else:
            began = time.perf_counter()
            run()
            times.append((time.perf_counter() - began) * 1e6)
    return statistics.median(times)


def measure(args) -> tuple[list[Timing], dict[str, str]]:
    """All timings, and the reason for each back end or case that was left out."""
    rows, missing = [], {}
    for name, shape in (TINY if args.tiny else MODELS).items():
        for tokens in args.tokens:
            for share in args.zero_shares:
                counts = draw_counts(shape, tokens, share, seed=tokens)
                found, absent = backends(args.device, shape, counts)
                missing |= absent
                total = int(counts.sum())
                product = 2.0 * total * shape.hidden * 2 * shape.width
                layer = 6.0 * total * shape.hidden * shape.width
                for backend in found:
                    for what, run in backend.runs().items():
                        flop = {"layer": layer, "layer_backward": 3 * layer}.get(what, product)
                        try:
                            us = median_us(run, args.device, args.repeats)
                        except (RuntimeError, ValueError) as error:
                            missing[f"{backend.name} {what} {name} T={tokens} z={share}"] = str(error)[:200]
                            continue
                        timing = Timing(name, backend.name, what, tokens, share, total, us, flop / us / 1e6)
                        rows.append(timing)
                        print(_line(timing), flush=True)
    return rows, missing


HEAD = f"{'model':14} {'what':15} {'T':>6} {'z':>5} {'rows':>7} {'backend':12} {'us':>10} {'TFLOP/s':>8}"


def _line(t: Timing) -> str:
    place = f"{t.model:14} {t.what:15} {t.tokens:6} {t.zero_share:5.2f} {t.rows:7}"
    return f"{place} {t.backend:12} {t.microseconds:10.1f} {t.tflops:8.1f}"


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit code 2 without the device."""
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__.splitlines()[0], allow_abbrev=False)

    def numbers(kind):
        return lambda text: tuple(kind(part) for part in text.split(","))

    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tokens", type=numbers(int), help="tokens over the experts' group")
    parser.add_argument("--zero-shares", type=numbers(float), help="shares of slots that chose zero experts")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument(
        "--quick", action="store_true", help="three token counts, two zero shares, 10 repeats"
    )
    parser.add_argument("--tiny", action="store_true", help="one tiny shape, to walk through the code")
    args = parser.parse_args(argv)
    if args.quick:
        args.repeats = 10
    args.tokens = args.tokens or ((8, 4096, 32768) if args.quick else TOKENS)
    args.zero_shares = args.zero_shares or ((0.0, 0.5) if args.quick else SHARES)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no CUDA device (--device cpu --tiny walks through)", file=sys.stderr)
        return 2
    print(HEAD)
    rows, missing = measure(args)
    for name, reason in missing.items():
        print(f"left out: {name}: {reason}")
    if args.json:
        name = torch.cuda.get_device_name(0) if args.device == "cuda" else "cpu"
        about = {"device": name, "torch": torch.__version__, "repeats": args.repeats, "left_out": missing}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**about, "timings": [asdict(row) for row in rows]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
