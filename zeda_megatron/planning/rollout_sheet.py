"""What sampling answers takes: tokens a second, memory of the engines, how many of them: `zeda plan rollouts`.

Speeds are a roofline's: an engine that does nothing but read weights and caches and multiply. A measured speed
(--tokens-per-second) takes their place.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace

from ..config.zero_experts import ZeroExpertConfig
from ..errors import UserError
from ..text_table import text_table
from .cost_sheet import decode_seconds, gpu
from .flops import BYTES, Geometry
from .memory import GIB


@dataclass(frozen=True)
class Wanted:
    """What is to be sampled, and on what."""

    answers: int
    """Answers in all; in stage 2 those of one round."""
    tokens: int
    """Mean length of an answer."""
    prompt_tokens: int
    """Mean length of a prompt."""
    hours: float
    """In which it is to be done."""
    ranks: int
    """GPUs of one engine, tensor-parallel."""
    gpu_memory: float
    """GiB of one GPU."""
    share: float
    """Of it that the engine may take: 0.9 where it is alone, 0.4 beside a training that wakes it up."""
    zero_share: float
    """Picks that are zero; the teacher's: 0."""
    measured: float | None = None
    """Tokens a second of one engine."""


def rollout_sheet(geometry: Geometry, name: str, wanted: Wanted) -> dict:
    """All figures, JSON-ready. `name`: of the GPU, as in `cost_sheet.gpu`.

    Raises:
        UserError: the weights do not fit the engine's GPUs, or leave no room for an answer.
    """
    device, length = gpu(name), wanted.prompt_tokens + wanted.tokens
    # Tensor-parallel GPUs share out arithmetic, weights and, up to the number of their heads, caches.
    device = replace(device, flops=device.flops * wanted.ranks, bandwidth=device.bandwidth * wanted.ranks)
    weights = BYTES * geometry.parameters
    answer = BYTES * geometry.cache * length + geometry.state
    room = wanted.gpu_memory * GIB * wanted.share * wanted.ranks - weights
    slots = int(room // answer)
    if slots < 1:
        raise UserError(
            f"--tensor-parallel-size {wanted.ranks}: {weights / GIB:.1f} GiB of weights and one answer of {length} "
            f"tokens do not fit {wanted.share:.0%} of {wanted.ranks} GPUs with {wanted.gpu_memory:.0f} GiB; give more"
        )
    slots = min(slots, wanted.answers)
    context = wanted.prompt_tokens + wanted.tokens // 2
    zero = ZeroExpertConfig(geometry.experts // 2 if wanted.zero_share else 0)
    step = sum(decode_seconds(geometry, device, slots, context, wanted.zero_share, zero).values())
    speed = wanted.measured or slots / step
    total = wanted.answers * wanted.tokens
    needed = total / (wanted.hours * 3600)
    engines = math.ceil(needed / speed)
    return {
        "tokens": total,
        "tokens_per_second_needed": needed,
        "weights_gib_per_gpu": weights / GIB / wanted.ranks,
        "cache_gib_per_answer": answer / GIB,
        "answers_under_way": slots,
        "cache_gib_per_gpu": slots * answer / GIB / wanted.ranks,
        "tokens_per_second_of_an_engine": speed,
        "measured": wanted.measured is not None,
        "engines": engines,
        "gpus": engines * wanted.ranks,
        "hours_of_one_engine": total / speed / 3600,
    }


def format_rollout_sheet(sheet: dict) -> str:
    """Lines for the terminal."""
    source = "measured" if sheet["measured"] else "at best, by roofline"
    rows = [
        ["tokens to sample", f"{sheet['tokens']:,}"],
        ["tokens a second for that time", f"{sheet['tokens_per_second_needed']:,.0f}"],
        ["weights on each GPU of an engine", f"{sheet['weights_gib_per_gpu']:.1f} GiB"],
        ["keys and values of one answer", f"{sheet['cache_gib_per_answer']:.2f} GiB"],
        ["answers under way in one engine", f"{sheet['answers_under_way']:,}"],
        ["their keys and values on each GPU", f"{sheet['cache_gib_per_gpu']:.1f} GiB"],
        [f"tokens a second of one engine ({source})", f"{sheet['tokens_per_second_of_an_engine']:,.0f}"],
        ["one engine alone", f"{sheet['hours_of_one_engine']:,.2f} h"],
        ["engines for that time", f"{sheet['engines']:,} ({sheet['gpus']:,} GPUs)"],
    ]
    return "\n".join(text_table(rows, "lr"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zeda plan rollouts",
        description="Sampling answers: tokens a second, memory of the engines, how many of them",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--hf", required=True, metavar="DIR", help="folder with a HF config.json (no weights needed)")
    add("--answers", type=int, required=True, help="answers in all; of stage 2 those of one round")
    add("--tokens", type=int, default=4096, metavar="T", help="mean length of an answer (4096)")
    add("--prompt-tokens", type=int, default=512, metavar="T", help="mean length of a prompt (512)")
    add("--hours", type=float, default=8.0, help="in which it is to be done (8)")
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs of one engine (1)")
    add("--gpu", default="h100", help="h100, h200 or a100 (h100)")
    add("--gpu-memory", type=float, default=80.0, metavar="GIB", help="of one GPU (80)")
    add("--gpu-share", type=float, default=0.9, metavar="S", help="the engine's (0.9; beside a training 0.4)")
    add("--zero-share", type=float, default=0.0, metavar="Z", help="share of zero picks (0: the teacher)")
    add("--tokens-per-second", type=float, metavar="X", help="of one engine, measured (else a roofline's)")
    add("--json", action="store_true", help="print JSON")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str]) -> int:
    """Entry point of zeda plan rollouts."""
    args = _parser().parse_args(argv)
    for flag in ("answers", "tokens", "prompt_tokens", "hours", "tensor_parallel_size", "gpu_memory"):
        if not getattr(args, flag) > 0:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} must be above 0")
    if args.tokens_per_second is not None and not args.tokens_per_second > 0:
        raise UserError(f"--tokens-per-second {args.tokens_per_second} must be above 0")
    if not 0 < args.gpu_share <= 1:
        raise UserError(f"--gpu-share {args.gpu_share} must be above 0 and at most 1")
    if not 0 <= args.zero_share < 1:
        raise UserError(f"--zero-share {args.zero_share} must be at least 0 and below 1")
    wanted = Wanted(
        args.answers,
        args.tokens,
        args.prompt_tokens,
        args.hours,
        args.tensor_parallel_size,
        args.gpu_memory,
        args.gpu_share,
        args.zero_share,
        args.tokens_per_second,
    )
    sheet = rollout_sheet(Geometry.read(args.hf), args.gpu, wanted)
    print(json.dumps(sheet, indent=2) if args.json else format_rollout_sheet(sheet))
    return 0
