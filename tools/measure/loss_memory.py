"""Peak memory and CPU time of the fused distillation loss against full logits with autograd (on Linux).

Each measurement is a process of its own, forward and backward of one call in float32; the peak is what the call
adds to the resident memory that the inputs already take. glibc is told to give blocks above 1 MiB back at once:
otherwise the peak shows how its heap happens to break up rather than what is in use.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from zeda_megatron.config.run import LOSS_KINDS
from zeda_megatron.errors import UserError
from zeda_megatron.runtime.worker import run_worker

PATHS = ("fused", "full")
MIB = 1 << 20


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--vocab", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--chunk-tokens", type=int, default=128)
    parser.add_argument("--kind", choices=LOSS_KINDS, default="forward_kl")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON line per row instead of the table"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--measure", choices=PATHS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise UserError(f"/proc/self/status has no {field}: this tool needs Linux")


def measure(path: str, options: argparse.Namespace) -> dict[str, float]:
    """Run one call in this process: {"peak": bytes above the inputs, "seconds": of CPU, "loss": per token}."""
    import torch

    from zeda_megatron.ops.vocab_kl import LossInputs, fused_distill_loss, reference_distill_loss

    torch.manual_seed(0)
    tokens, vocab = options.tokens[0], options.vocab[0]
    shapes = ((tokens, options.hidden), (vocab, options.hidden)) * 2
    hidden_TH, weight_VH, teacher_TH, teacher_VH = (torch.randn(*shape) * 0.2 for shape in shapes)
    heads = (hidden_TH.requires_grad_(), weight_VH.requires_grad_(), teacher_TH, teacher_VH)
    inputs = LossInputs(*heads, torch.randint(0, vocab, (tokens,)), torch.ones(tokens))
    with contextlib.suppress(OSError):  # not every sandbox has it; the peak then counts from the start
        Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    start = time.process_time()
    if path == "fused":
        loss, _ = fused_distill_loss(inputs, kind=options.kind, chunk_tokens=options.chunk_tokens)
    else:
        loss, _ = reference_distill_loss(inputs, kind=options.kind)
    loss.backward()
    seconds = time.process_time() - start
    return {"peak": resident("VmHWM") - before, "seconds": seconds, "loss": loss.item() / tokens}


def measure_apart(path: str, tokens: int, vocab: int, options: argparse.Namespace) -> dict[str, float]:
    """`measure` in a fresh process, so that no earlier peak is seen."""
    command = [sys.executable, "-m", __spec__.name, "--measure", path, "--tokens", tokens, "--vocab", vocab]
    command += ["--hidden", options.hidden, "--chunk-tokens", options.chunk_tokens, "--kind", options.kind]
    here = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB), "PYTHONPATH": here}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(
            f"measuring {path} at --tokens {tokens} --vocab {vocab} failed: {done.stderr.strip()}"
        )
    return json.loads(done.stdout)


def main() -> int:
    options = parse()
    for flag in ("tokens", "vocab", "hidden", "chunk_tokens"):
        value = getattr(options, flag)
        if min(value if isinstance(value, list) else [value]) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1, got {value}")
    if options.measure:
        print(json.dumps(measure(options.measure, options)))
        return 0
    if not options.json:
        print(
            f"{options.kind}, hidden {options.hidden}, chunks of {options.chunk_tokens} tokens, float32; MiB"
        )
        print(f"{'tokens':>7} {'vocab':>7} {'[T, V]':>8} {'fused':>8} {'full':>8} {'CPU s':>8} {'CPU s':>8}")
    for vocab in options.vocab:
        for tokens in options.tokens:
            row = {path: measure_apart(path, tokens, vocab, options) for path in PATHS}
            if options.json:
                print(json.dumps({"tokens": tokens, "vocab": vocab, **row}))
                continue
            sizes = [4 * tokens * vocab, *(row[path]["peak"] for path in PATHS)]
            print(
                f"{tokens:>7} {vocab:>7}",
                *(f"{size / MIB:>8.1f}" for size in sizes),
                *(f"{row[path]['seconds']:>8.2f}" for path in PATHS),
            )
    return 0


if __name__ == "__main__":
    run_worker(main)
