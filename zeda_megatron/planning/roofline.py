"""Roofline: the shortest time a forward pass can take on a named GPU, and what zero experts change.

Each part takes the longer of its arithmetic at peak rate and its memory traffic at peak bandwidth; the parts
follow one another. No launch overhead, no communication, uniform routing: a bound, not a forecast.
Decoding is bound by the weights read, so what counts there is how many distinct experts a batch touches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..errors import UserError
from .flops import Flops, flops_per_token
from .geometry import Geometry

BYTES = 2  # bf16 weights, activations and cache


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
    hit = geometry.topk * (1.0 - zero_share) / geometry.experts
    return geometry.experts * (1.0 - (1.0 - hit) ** tokens)


def decode_seconds(
    geometry: Geometry, device: Gpu, batch: int, context: int, zero_share: float = 0.0, zero_rows: int = 0
) -> dict[str, float]:
    """Seconds of one decoding step by part: a new token for each of `batch` sequences, `context` cached."""
    flops = flops_per_token(geometry, context, zero_share, zero_rows, cached=True)
    cache = BYTES * batch * context * geometry.layers * geometry.attention.cache
    return _seconds(geometry, device, flops, batch, batch, cache, zero_share, zero_rows)


def prefill_seconds(
    geometry: Geometry, device: Gpu, tokens: int, context: int, zero_share: float = 0.0, zero_rows: int = 0
) -> dict[str, float]:
    """Seconds of one prefill by part: `tokens` tokens in causal sequences of `context`, last logits only."""
    context = min(context, tokens)
    flops = flops_per_token(geometry, (context + 1) / 2, zero_share, zero_rows)
    cache = BYTES * tokens * geometry.layers * geometry.attention.cache
    return _seconds(geometry, device, flops, tokens, max(1, tokens // context), cache, zero_share, zero_rows)


def _seconds(
    geometry: Geometry,
    device: Gpu,
    flops: Flops,
    tokens: int,
    logits: int,
    cache_bytes: float,
    zero_share: float,
    zero_rows: int,
) -> dict[str, float]:
    hidden, moe = geometry.hidden, geometry.moe_layers
    rows = tokens * geometry.topk * (1.0 - zero_share)
    experts = distinct_experts(geometry, tokens, zero_share)
    # Bytes with everything fused: weights once, input and output once, the activation between the two
    # products written and read once.
    traffic = {
        "attention_projections": geometry.layers * geometry.attention.projection,
        "attention_scores": cache_bytes / BYTES,
        "router": moe * hidden * (geometry.experts + zero_rows),
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
    zero_rows: int,
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
            dynamic = sum(seconds(geometry, device, tokens, context, zero_share, zero_rows).values())
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
