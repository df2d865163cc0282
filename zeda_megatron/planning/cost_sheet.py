"""Cost sheet of one model: parameters, FLOPs per token, roofline; static against dynamic, as text or JSON.

The roofline is the shortest time a forward pass can take on a named GPU, and what zero experts change. Each part
takes the longer of its arithmetic at peak rate and its memory traffic at peak bandwidth; the parts follow one
another. No launch overhead, no communication, uniform routing: a bound, not a forecast. Decoding is bound by the
weights read, so what counts there is how many distinct experts a batch touches.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..config.fit import stand_in_rank
from ..config.zero_experts import ZeroExpertConfig
from ..errors import UserError
from ..models.hf_config import zero_experts_of
from ..text_table import text_table
from .flops import BYTES, STATIC, Flops, Geometry, flop_ratio, flops_per_token


@dataclass(frozen=True)
class Gpu:
    """Peak figures of one GPU."""

    name: str
    flops: float
    """Dense bf16 FLOP/s of the tensor cores."""
    bandwidth: float
    """Memory bandwidth in bytes/s."""
    source: str
    """Where the two figures are from."""


_HOPPER = "1,979 TFLOP/s bf16 with sparsity, half of it dense"
GPUS = {
    "a100": Gpu("A100 SXM 80GB", 312e12, 2.039e12, "NVIDIA A100 datasheet: 312 TFLOP/s bf16, 2,039 GB/s"),
    "h100": Gpu("H100 SXM", 989.5e12, 3.35e12, f"NVIDIA H100 datasheet: {_HOPPER}; 3.35 TB/s"),
    "h200": Gpu("H200 SXM", 989.5e12, 4.8e12, f"NVIDIA H200 datasheet: {_HOPPER}; 4.8 TB/s"),
}


def gpu(name: str, flops: float | None = None, bandwidth: float | None = None) -> Gpu:
    """A GPU by its short name; measured `flops` (FLOP/s) and `bandwidth` (bytes/s) replace the datasheet's.

    With both given any name will do. Raises `UserError` for a name or rate that cannot be used.
    """
    for flag, rate in (("--tflops", flops), ("--tbps", bandwidth)):
        if rate is not None and rate <= 0:
            raise UserError(f"{flag}: must be more than 0")
    if flops and bandwidth:
        return Gpu(name, flops, bandwidth, "both given by hand")
    if name.lower() not in GPUS:
        raise UserError(f"--gpu {name}: not known; known: {', '.join(GPUS)}; others need --tflops and --tbps")
    known = GPUS[name.lower()]
    if flops or bandwidth:
        source = f"{'arithmetic' if flops else 'bandwidth'} given by hand; {known.source}"
        known = replace(
            known, flops=flops or known.flops, bandwidth=bandwidth or known.bandwidth, source=source
        )
    return known


def distinct_experts(geometry: Geometry, tokens: float, zero_share: float = 0.0) -> float:
    """Expected number of real experts that `tokens` tokens touch in one layer under uniform routing."""
    return _distinct(geometry, tokens, 1.0 - zero_share)


def _distinct(geometry: Geometry, tokens: float, share: float) -> float:
    """Experts that a share of the picks touches."""
    hit = geometry.topk * share / geometry.experts
    return geometry.experts * (1.0 - (1.0 - hit) ** tokens)


def decode_seconds(
    geometry: Geometry,
    device: Gpu,
    batch: int,
    context: int,
    zero_share: float = 0.0,
    zero: ZeroExpertConfig = STATIC,
) -> dict[str, float]:
    """Seconds of one decoding step by part: a new token for each of `batch` sequences, `context` cached."""
    flops = flops_per_token(geometry, context, zero_share, zero, cached=True)
    cache = BYTES * batch * geometry.attended(context) * geometry.attention.cache
    cache += 2 * batch * geometry.state  # read and written
    return _seconds(geometry, device, flops, batch, batch, cache, zero_share, zero)


def prefill_seconds(
    geometry: Geometry,
    device: Gpu,
    tokens: int,
    context: int,
    zero_share: float = 0.0,
    zero: ZeroExpertConfig = STATIC,
) -> dict[str, float]:
    """Seconds of one prefill by part: `tokens` tokens in causal sequences of `context`, last logits only."""
    context = min(context, tokens)
    flops = flops_per_token(geometry, (context + 1) / 2, zero_share, zero)
    cache = BYTES * tokens * geometry.cache + max(1, tokens // context) * geometry.state
    return _seconds(geometry, device, flops, tokens, max(1, tokens // context), cache, zero_share, zero)


def _seconds(
    geometry: Geometry,
    device: Gpu,
    flops: Flops,
    tokens: int,
    logits: int,
    cache_bytes: float,
    zero_share: float,
    zero: ZeroExpertConfig,
) -> dict[str, float]:
    hidden, moe = geometry.hidden, geometry.moe_layers
    rows = tokens * geometry.topk * (1.0 - zero_share)
    experts = distinct_experts(geometry, tokens, zero_share)
    # Bytes with everything fused: weights once, input and output once, the activation between the two
    # products written and read once.
    traffic = {
        "attention_projections": geometry.projections,
        "attention_scores": cache_bytes / BYTES,
        "router": moe * hidden * (geometry.experts + zero.num_zero_rows),
        "heads": moe * geometry.costs(zero)[0] * geometry.topk * geometry.expert,
        "stand_ins": moe
        * _distinct(geometry, tokens, zero_share)
        * geometry.costs(zero)[1]
        * geometry.expert,
        "routed_experts": moe
        * (experts * geometry.expert + 2 * tokens * hidden + 2 * rows * geometry.expert_width),
        "shared_experts": moe * 3 * hidden * geometry.shared_width,
        "dense_mlp": (geometry.layers - moe) * 3 * hidden * geometry.dense_width,
        "lm_head": hidden * geometry.vocabulary,
    }
    seconds = {}
    for part, numbers in traffic.items():
        positions = logits if part == "lm_head" else tokens
        arithmetic = positions * getattr(flops, part) / device.flops
        seconds[part] = max(arithmetic, BYTES * numbers / device.bandwidth)
    return seconds


@dataclass(frozen=True)
class Prediction:
    """One line of the roofline table."""

    phase: str
    """`decode` or `prefill`."""
    tokens: int
    """Batch of a decoding step, or tokens of a prefill."""
    static_ms: float
    dynamic_ms: float
    static_experts: float
    """Distinct experts read per layer, static model."""
    dynamic_experts: float

    @property
    def speedup(self) -> float:
        return self.static_ms / self.dynamic_ms


def predict(
    geometry: Geometry,
    device: Gpu,
    zero_share: float,
    zero: ZeroExpertConfig,
    context: int,
    batches: tuple[int, ...],
    prefills: tuple[int, ...],
) -> list[Prediction]:
    """Static against dynamic for every decoding batch and prefill size."""
    lines: list[Prediction] = []
    phases: list[tuple[str, tuple[int, ...], Callable[..., dict[str, float]]]] = [
        ("decode", batches, decode_seconds),
        ("prefill", prefills, prefill_seconds),
    ]
    for phase, sizes, seconds in phases:
        for tokens in sizes:
            static = sum(seconds(geometry, device, tokens, context).values())
            dynamic = sum(seconds(geometry, device, tokens, context, zero_share, zero).values())
            lines.append(
                Prediction(
                    phase,
                    tokens,
                    1e3 * static,
                    1e3 * dynamic,
                    distinct_experts(geometry, tokens),
                    distinct_experts(geometry, tokens, zero_share),
                )
            )
    return lines


BATCHES = (1, 8, 32, 64, 256)


def cost_sheet(
    geometry: Geometry,
    device: Gpu,
    zero_share: float,
    zero: ZeroExpertConfig,
    context: int,
    tokens: tuple[int, ...],
    batches: tuple[int, ...] = BATCHES,
) -> dict:
    """All figures of one model as a JSON-ready dict.

    `context` is the number of attended positions in the FLOP table and the cache length in decoding; `tokens`
    are the prefill sizes, `batches` the decoding batches of the roofline.
    """
    static = flops_per_token(geometry, context)
    dynamic = flops_per_token(geometry, context, zero_share, zero)
    lines = predict(geometry, device, zero_share, zero, context, batches, tokens)
    return {
        "model": {
            "model_type": geometry.model_type,
            "layers": geometry.layers,
            "moe_layers": geometry.moe_layers,
            "experts": geometry.experts,
            "topk": geometry.topk,
            "zero_experts": zero.num_zero_rows,
        },
        "zero_share": zero_share,
        "context": context,
        "parameters": {
            "total": geometry.parameters,
            "active_static": geometry.active_parameters(),
            "active_dynamic": geometry.active_parameters(zero_share),
        },
        "weight_bytes": {
            "total": BYTES * geometry.parameters,
            "routed_experts": BYTES * geometry.routed_parameters,
        },
        "flops_per_token": {"static": static.as_dict(), "dynamic": dynamic.as_dict()},
        "expert_flops": (dynamic.routed_experts + dynamic.heads + dynamic.stand_ins) / static.routed_experts
        if static.routed_experts
        else 1.0,
        "flop_ratio": flop_ratio(geometry, context, zero_share, zero),
        "gpu": {
            "name": device.name,
            "flops": device.flops,
            "bandwidth": device.bandwidth,
            "source": device.source,
        },
        "roofline": [
            {
                "phase": line.phase,
                "tokens": line.tokens,
                "static_ms": line.static_ms,
                "dynamic_ms": line.dynamic_ms,
                "speedup": line.speedup,
                "static_experts": line.static_experts,
                "dynamic_experts": line.dynamic_experts,
            }
            for line in lines
        ],
    }


def format_cost_sheet(sheet: dict) -> str:
    """The dict of `cost_sheet` as a table for the terminal."""
    model, params, weights, device = (sheet[k] for k in ("model", "parameters", "weight_bytes", "gpu"))
    large = sheet["flops_per_token"]["static"]["total"] >= 1e9
    unit, one = ("GFLOP", 1e9) if large else ("MFLOP", 1e6)
    out = [
        f"{model['model_type']}: {model['layers']} layers ({model['moe_layers']} with experts), "
        f"{model['experts']} experts, top-{model['topk']}, {model['zero_experts']} zero experts, "
        f"zero share {sheet['zero_share']:.3g}",
        f"  parameters {_count(params['total'])}, active {_count(params['active_static'])} static, "
        f"{_count(params['active_dynamic'])} dynamic",
        f"  weights    {_bytes(weights['total'])} bf16, {_bytes(weights['routed_experts'])} of it "
        "routed experts (zero experts do not shrink them)",
        "",
        f"FLOPs per token, attending to {sheet['context']:,} positions   [{unit}]",
    ]
    rows = [["", "static", "of all", "dynamic"]]
    static, dynamic = sheet["flops_per_token"]["static"], sheet["flops_per_token"]["dynamic"]
    for part, value in static.items():
        if value or dynamic[part]:
            name, of_all = part.replace("_", " "), value / static["total"]
            rows.append([name, f"{value / one:.3f}", f"{of_all:.1%}", f"{dynamic[part] / one:.3f}"])
    out += [
        *text_table(rows, indent="  "),
        f"  expert FLOPs left {sheet['expert_flops']:.1%} of the static model's; "
        f"static/dynamic in all {sheet['flop_ratio']:.2f}x",
        "",
        f"Roofline, {device['name']}: {device['flops'] / 1e12:.5g} TFLOP/s dense bf16, "
        f"{device['bandwidth'] / 1e12:.4g} TB/s ({device['source']})",
    ]
    rows = [["phase", "tokens", "static ms", "dynamic ms", "speed-up", "distinct experts read per layer"]]
    for line in sheet["roofline"]:
        times = [_ms(line["static_ms"]), _ms(line["dynamic_ms"]), f"{line['speedup']:.2f}x"]
        experts = f"{line['static_experts']:.0f} -> {line['dynamic_experts']:.0f}"
        rows.append([line["phase"], f"{line['tokens']:,}", *times, experts])
    out += [
        *text_table(rows, "lrrrrl", "  "),
        f"  decode: one new token per sequence, {sheet['context']:,} cached positions. "
        f"prefill: causal sequences of {sheet['context']:,}, last logits.",
        "  A bound under uniform routing (no launches, no communication): predicted, not measured.",
    ]
    return "\n".join(out)


def _count(number: float) -> str:
    """`30.53 B`, `4.71 M`."""
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e6:.2f} M"


def _bytes(number: float) -> str:
    """`61.1 GB`, `9.4 MB`."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _ms(milliseconds: float) -> str:
    """Two digits behind the point, four where these would say nothing."""
    return f"{milliseconds:.2f}" if milliseconds >= 0.1 else f"{milliseconds:.4f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zeda plan flops",
        description="FLOPs, bytes, roofline and predicted speed-up of a MoE model",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--hf", required=True, metavar="DIR", help="folder with a HF config.json (no weights needed)")
    add("--zero-share", type=float, default=0.5, metavar="Z", help="share of zero picks (0.5)")
    add("--num-zero-experts", type=int, metavar="N", help="router rows added (the checkpoint's, or N/2)")
    add_paired_flags(parser)
    add("--tokens", type=int, nargs="+", default=[4096, 16384, 65536], metavar="T", help="prefill sizes")
    add("--batch", type=int, nargs="+", default=list(BATCHES), metavar="B", help="decoding batches")
    add("--context", type=int, default=4096, metavar="C", help="positions attended to (4096)")
    add("--gpu", default="h100", help="h100, h200 or a100 (h100)")
    add("--tflops", type=float, help="measured dense bf16 TFLOP/s instead of the datasheet's")
    add("--tbps", type=float, help="measured TB/s of memory instead of the datasheet's")
    add("--json", action="store_true", help="print JSON")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_paired_flags(parser: argparse.ArgumentParser) -> None:
    """What a plan is told of paired zero experts, as a fit makes them."""
    add = parser.add_argument
    add("--paired-head-width", type=int, metavar="h", help="hidden units of paired heads (the checkpoint's)")
    add(
        "--stand-in-rank",
        type=int,
        metavar="r",
        help="rank of paired stand-ins (the checkpoint's, or a fit's)",
    )
    add(
        "--paired", action="store_true", help="paired zero experts (the checkpoint's), as zeda fit makes them"
    )


def paired_zero_experts(
    args: argparse.Namespace, experts: int, expert_width: int, has: ZeroExpertConfig
) -> ZeroExpertConfig | None:
    """The paired zero experts that these flags, or the folder's config, ask for; None if they are shared."""
    given = (args.paired_head_width, args.stand_in_rank)
    if not (args.paired or has.paired or any(given)):
        return None
    its = (has.paired_head_width, has.stand_in_rank if has.paired else stand_in_rank(expert_width))
    width, rank = (its[i] if value is None else value for i, value in enumerate(given))
    kind = "low_rank" if rank else has.zero_experts_type if has.paired and not has.stand_in_rank else "zero"
    score = has.paired_score if has.paired else "weight+head"
    found = ZeroExpertConfig(experts, kind, "paired", score, width, rank)
    found.validate(experts, 1)
    return found


def main(argv: list[str]) -> int:
    """Entry point of zeda plan flops."""
    args = _parser().parse_args(argv)
    for flag, values in (("--tokens", args.tokens), ("--batch", args.batch), ("--context", [args.context])):
        if min(values) < 1:
            raise UserError(f"{flag} {min(values)}: must be 1 or more")
    geometry = Geometry.read(args.hf)
    has = zero_experts_of(geometry.config)
    zero = paired_zero_experts(args, geometry.experts, geometry.expert_width, has)
    if zero is None:
        number = args.num_zero_experts
        if number is None:
            number = has.num_zero_rows or geometry.experts // 2
        if number < 0:
            raise UserError(f"--num-zero-experts {number}: must be 0 or more")
        zero = ZeroExpertConfig(number)
    flops = None if args.tflops is None else args.tflops * 1e12
    bandwidth = None if args.tbps is None else args.tbps * 1e12
    device = gpu(args.gpu, flops, bandwidth)
    sheet = cost_sheet(
        geometry, device, args.zero_share, zero, args.context, tuple(args.tokens), tuple(args.batch)
    )
    print(json.dumps(sheet, indent=2) if args.json else format_cost_sheet(sheet))
    return 0
