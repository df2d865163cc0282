#!/usr/bin/env python
"""Times the expert MLP of both models: own kernels, torch's grouped GEMM, Triton, Transformer Engine.

    python kernels/bench.py [--json FILE] [--tokens 8,64,...] [--zero-shares 0,.5] [--backends kernels] [--quick]
    python kernels/bench.py --tiles          # where the large tile begins, how: into zeda_kernels/tiles.json

Random data, uniform routing. Two times of every call: the device's (median of CUDA events around replays of its graph,
or around calls where it cannot be captured) and the host's (the least that Python takes to launch it). `bound` is the
least that the device could take, by its own speed at a large product and a large copy, measured first. A back end that
is not installed is left out and named. `--device cpu --tiny` walks through the same code; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_backends import BACKENDS, Shape, backends
from zeda_kernels import kernel_call
from zeda_kernels.cuda_kernels import CHOSEN, LEADS
from zeda_kernels.cuda_kernels import TILES as KERNEL_TILES

MODELS = {
    "qwen3_30b_a3b": Shape(experts=128, picks=8, hidden=2048, width=768),
    "glm_4_7_flash": Shape(experts=64, picks=4, hidden=2048, width=1536),
}
TINY = {"tiny": Shape(experts=5, picks=2, hidden=16, width=8)}
TOKENS = (8, 64, 512, 4096, 16384, 32768, 65536)
SHARES = (0.0, 0.25, 0.5, 0.75)
ROWS_PER_EXPERT = (32, 48, 64, 80, 96, 112, 128, 160, 192, 256)
"""Where --tiles looks for the tiles."""
MANY_ROWS = (256, 1024)
"""And for the lead."""
TILES = Path(__file__).parent / "zeda_kernels" / "tiles.json"


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
    device_us: float
    """Median time on the device."""
    how: str
    """`graph`: of a replay; `events`: of a call, Python's time included where the device waits for it; `cpu`."""
    host_us: float
    """Least time that Python took until it had launched everything."""
    bound_us: float
    """The larger of the products' time at the device's rate and the bytes' at its bandwidth; 0: not measured."""
    tflops: float
    """Of the products, by `device_us`."""


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches."""

    flops: float = 0.0
    """Per second, of a bf16 product of 8192 x 8192 x 8192."""
    bandwidth: float = 0.0
    """Bytes per second, read and written, of a copy of 4 GiB."""

    @classmethod
    def of(cls, device: str) -> Ceilings:
        if device != "cuda":
            return cls()
        a = torch.randn(8192, 8192, device=device).bfloat16()
        product, _ = device_time(lambda: a @ a, device, 10, graph=False)
        source = torch.empty(2 << 30, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy, _ = device_time(lambda: target.copy_(source), device, 10, graph=False)
        return cls(2 * 8192**3 / product * 1e6, 2 * source.numel() / copy * 1e6)

    def bound_us(self, flop: float, moved: float) -> float:
        return max(flop / self.flops, moved / self.bandwidth) * 1e6 if self.flops else 0.0


def draw_counts(shape: Shape, tokens: int, share: float, seed: int) -> torch.Tensor:
    """Rows of each expert: each slot is a zero expert with probability `share`, else uniform."""
    generator = torch.Generator().manual_seed(seed)
    real = int((torch.rand(tokens * shape.picks, generator=generator) >= share).sum())
    ids = torch.randint(0, shape.experts, (real,), generator=generator)
    return torch.bincount(ids, minlength=shape.experts)


def device_time(run, device: str, repeats: int, graph: bool = True) -> tuple[float, str]:
    """Median time of one call in microseconds, and how it was measured."""
    for _ in range(3 if device == "cuda" else 1):
        run()
    how = "cpu"
    if device == "cuda":
        captured = _captured(run) if graph else None
        run, how = (captured.replay, "graph") if captured else (run, "events")
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
    return statistics.median(times), how


def _captured(run) -> torch.cuda.CUDAGraph | None:
    """The call as a graph; None if it waits for the device or cannot be captured."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(side):
            run()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=side):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def host_time(run, device: str, repeats: int) -> float:
    """Least time until a call has launched everything, in microseconds."""
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        times.append((time.perf_counter() - began) * 1e6)
    return min(times)


def work(shape: Shape, counts: torch.Tensor, what: str) -> tuple[float, float]:
    """Operations of the products, and bytes that must be moved at least: weights of experts with rows, rows once."""
    rows, active = int(counts.sum()), int((counts > 0).sum())
    hidden, inner = shape.hidden, shape.width
    fc1, fc2 = active * 2 * inner * hidden, active * inner * hidden
    product, layer = 2.0 * rows * hidden * 2 * inner, 6.0 * rows * hidden * inner
    moved = {
        "forward": 2 * fc1 + 2 * rows * (hidden + 2 * inner),
        "dgrad": 2 * fc1 + 2 * rows * (hidden + 2 * inner),
        "wgrad": 8 * fc1 + 2 * rows * (hidden + 2 * inner),
        "fc1": 2 * fc1 + 2 * rows * (hidden + 3 * inner),
        "act": 2 * fc1 + 2 * rows * (hidden + inner),
        "layer": 2 * (fc1 + fc2) + 2 * rows * (2 * hidden + 2 * inner),
        "layer_backward": (2 + 2 + 8) * (fc1 + fc2) + 2 * rows * (5 * hidden + 12 * inner),
    }[what]
    return {"layer": layer, "layer_backward": 3 * layer}.get(what, product), moved


def measure(args) -> tuple[list[Timing], dict[str, str]]:
    """All timings, and the reason for each back end or case that was left out."""
    rows, missing, ceilings = [], {}, Ceilings.of(args.device)
    for name, shape in (TINY if args.tiny else MODELS).items():
        for tokens in args.tokens:
            for share in args.zero_shares:
                counts = draw_counts(shape, tokens, share, seed=tokens)
                found, absent = backends(args.device, shape, counts, args.backends)
                missing |= absent
                total = int(counts.sum())
                for backend in found:
                    for what, run in backend.runs().items():
                        flop, moved = work(shape, counts, what)
                        try:
                            us, how = device_time(run, args.device, args.repeats)
                            host = host_time(run, args.device, args.repeats)
                        except (RuntimeError, ValueError) as error:
                            missing[f"{backend.name} {what} {name} T={tokens} z={share}"] = str(error)[:200]
                            continue
                        place = (name, backend.name, what, tokens, share, total)
                        timing = Timing(
                            *place, us, how, host, ceilings.bound_us(flop, moved), flop / us / 1e6
                        )
                        rows.append(timing)
                        print(_line(timing), flush=True)
    return rows, missing


def crossover(times: dict[int, tuple[float, float]]) -> int:
    """Rows per expert from which the large tile takes less time than the small one at every count that was tried.

    Args:
        times: rows per expert -> (small, large), in any unit.
    """
    found = None
    for rows in sorted(times, reverse=True):
        small, large = times[rows]
        if large > small:
            break
        found = rows
    return max(times) + 1 if found is None else found


def times_of(args, rows: int, name: str, choices: tuple[str, ...]) -> tuple[float, ...]:
    """Time of act and forward together, over the models, for each value of an environment variable of the kernels."""
    sums = []
    for choice in choices:
        os.environ[name] = choice
        total = 0.0
        for shape in (TINY if args.tiny else MODELS).values():
            found, _ = backends(args.device, shape, torch.full((shape.experts,), rows), ["kernels"])
            runs = found[0].runs()
            total += sum(device_time(runs[run], args.device, args.repeats)[0] for run in ("act", "forward"))
        sums.append(total)
    del os.environ[name]
    told = ", ".join(f"{choice} {us:.1f}" for choice, us in zip(choices, sums))
    print(f"{rows:4} rows per expert, {name}, us: {told}", flush=True)
    return tuple(sums)


def find_tiles(args) -> int:
    """Find which tile is faster from where on, and the lead of the large one that is fastest; write both down."""
    missing = kernel_call.why_not(torch.device("cuda"), torch.bfloat16) if args.device == "cuda" else None
    if missing:
        print(f"error: --tiles: {missing}", file=sys.stderr)
        return 2
    counts, many = ((2, 4), (8,)) if args.tiny else (ROWS_PER_EXPERT, MANY_ROWS)
    os.environ["ZEDA_KERNEL_TILE"] = "large"
    leads = {rows: times_of(args, rows, "ZEDA_KERNEL_LEAD", LEADS) for rows in many}
    sums = [sum(each) for each in zip(*leads.values())]
    lead = min(range(len(LEADS)), key=sums.__getitem__)
    os.environ["ZEDA_KERNEL_LEAD"] = LEADS[lead]
    tiles = {rows: times_of(args, rows, "ZEDA_KERNEL_TILE", KERNEL_TILES) for rows in counts}
    del os.environ["ZEDA_KERNEL_LEAD"]
    begins = crossover(tiles)
    print(f"the large tile from {begins} rows per expert on, its halves {lead} products apart")
    if args.device == "cuda":
        chosen = {"source": torch.cuda.get_device_name(0), "large_from": begins, "lead": lead}
        measured = {"small_and_large_us": tiles, "leads_us": leads}
        TILES.write_text(json.dumps(CHOSEN | chosen | measured, indent=2) + "\n")
    return 0


HEAD = (
    f"{'model':14} {'what':15} {'T':>6} {'z':>5} {'rows':>7} {'backend':12} {'device us':>10} {'host us':>8} "
    f"{'bound us':>9} {'TFLOP/s':>8}"
)


def _line(t: Timing) -> str:
    place = f"{t.model:14} {t.what:15} {t.tokens:6} {t.zero_share:5.2f} {t.rows:7}"
    mark = "" if t.how != "events" else " (events)"
    times = f"{t.device_us:10.1f} {t.host_us:8.1f} {t.bound_us:9.1f}"
    return f"{place} {t.backend:12} {times} {t.tflops:8.1f}{mark}"


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit code 2 without the device."""
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__.splitlines()[0], allow_abbrev=False)

    def numbers(kind):
        return lambda text: tuple(kind(part) for part in text.split(","))

    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tokens", type=numbers(int), help="tokens over the experts' group")
    parser.add_argument("--zero-shares", type=numbers(float), help="shares of slots that chose zero experts")
    parser.add_argument("--backends", type=lambda text: text.split(","), help=f"of {', '.join(BACKENDS)}")
    parser.add_argument(
        "--tiles", action="store_true", help="find where the large tile begins, and how; write it down"
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument(
        "--quick", action="store_true", help="three token counts, two zero shares, 10 repeats"
    )
    parser.add_argument("--tiny", action="store_true", help="one tiny shape, to walk through the code")
    args = parser.parse_args(argv)
    unknown = set(args.backends or ()) - set(BACKENDS)
    if unknown:
        parser.error(f"--backends: {sorted(unknown)[0]!r} is unknown; choose among {', '.join(BACKENDS)}")
    if args.quick:
        args.repeats = 10
    args.tokens = args.tokens or ((8, 4096, 32768) if args.quick else TOKENS)
    args.zero_shares = args.zero_shares or ((0.0, 0.5) if args.quick else SHARES)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no CUDA device (--device cpu --tiny walks through)", file=sys.stderr)
        return 2
    if args.tiles:
        return find_tiles(args)
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
