"""Speed of serving at a forced zero share, in transformers: the static model, ours, and zero slots with weight 0.

python -m tools.measure.serving --hf examples/qwen3_30b_a3b

Real layer geometry, random weights, few layers. All ways take turns in one process, so that a busy machine slows all
alike; the figure is the ratio to the static model, of the fastest passes. On the CPU time is CPU time of one thread, on
a GPU time between two events.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import DynamicCache

from zeda_megatron.durable_file import write_result
from zeda_megatron.errors import UserError
from zeda_megatron.runtime.worker import run_worker
from zeda_megatron.text_table import markdown_table

from .serving_arms import WAYS, Contest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--hf", type=Path, required=True, help="HF folder; its config.json is enough")
    parser.add_argument("--layers", type=int, default=1, help="MoE layers to build")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="zero shares")
    parser.add_argument("--prefill", type=int, nargs="+", default=[512], help="tokens of a prompt")
    parser.add_argument("--prefill-batches", type=int, nargs="+", default=[1], help="prompts at a time")
    parser.add_argument(
        "--decode", type=int, nargs="+", default=[1, 8, 32], help="batch sizes of one new token"
    )
    parser.add_argument("--context", type=int, default=256, help="tokens in the cache while decoding")
    parser.add_argument("--stand-in-rank", type=int, default=16, help="of the way `stand-ins`")
    parser.add_argument("--repeats", type=int, default=4, help="timed passes of each way; the fastest counts")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments)
    for flag in ("layers", "context", "repeats", "stand_in_rank"):
        if getattr(options, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1")
    if not all(0 <= share <= 1 for share in options.shares):
        raise UserError(f"--shares {options.shares} must lie between 0 and 1")
    if not all(size > 0 for size in options.prefill + options.prefill_batches + options.decode):
        raise UserError("--prefill, --prefill-batches and --decode must be at least 1")
    if options.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {options.device}: no GPU here, use cpu")
    return options


def arms(shares: list[float]) -> list[tuple[str, float]]:
    """(way, share) of all passes; the static model has no share."""
    return [("static", 0.0)] + [(way, share) for way in WAYS[1:] for share in shares]


@torch.no_grad()
def measure(contest: Contest, options: argparse.Namespace) -> list[dict]:
    """One dict per workload, way and share: seconds of the MoE layers alone and of the whole model."""
    rows = []
    workloads = [("prefill", batch, size) for batch in options.prefill_batches for size in options.prefill]
    workloads += [("decode", batch, 1) for batch in options.decode]
    for phase, batch, tokens in workloads:
        passes = _passes(contest, phase, batch, tokens, options.context)
        best: dict = {}
        for turn in range(options.repeats + 1):
            for arm in arms(options.shares):
                with contest.arm(*arm):
                    for part, run in passes.items():
                        seconds = _seconds(run, contest.device)
                        if turn:  # the first turn warms up
                            best[arm, part] = min(best.get((arm, part), seconds), seconds)
        for way, share in arms(options.shares):
            row = {"phase": phase, "batch": batch, "tokens": tokens, "way": way, "share": share}
            for part in passes:
                row[f"{part}_seconds"] = best[(way, share), part]
                row[f"{part}_ratio"] = best[(way, share), part] / best[("static", 0.0), part]
            rows.append(row)
    return rows


def _passes(contest: Contest, phase: str, batch: int, tokens: int, context: int) -> dict:
    """What is timed: `moe`, the MoE layers alone, and `model`, all of the model but its head."""
    model, draw = contest.model, torch.Generator().manual_seed(1)
    ids_BS = torch.randint(0, contest.vocabulary, (batch, context + tokens), generator=draw)
    ids_BS = ids_BS.to(contest.device)
    hidden_BSH = torch.randn(batch, tokens, model.config.hidden_size, generator=draw)
    hidden_BSH = hidden_BSH.to(contest.device, model.dtype)

    def moe():
        for block in model.moe_blocks():
            block(hidden_BSH)

    def prefill():
        model.model(ids_BS[:, :tokens], use_cache=True)

    if phase == "prefill":
        return {"moe": moe, "model": prefill}
    cache = DynamicCache(config=model.config)
    # By position: versions of transformers disagree on the cache's name.
    model.model(ids_BS[:, :context], None, None, cache, use_cache=True)

    def decode():
        model.model(ids_BS[:, context:], None, None, cache, use_cache=True)
        cache.crop(-1)

    return {"moe": moe, "model": decode}


def _seconds(run, device: str) -> float:
    if device == "cpu":
        before = time.process_time()
        run()
        return time.process_time() - before
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    run()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1e3


def table(rows: list[dict]) -> list[str]:
    """Markdown lines: a workload per line, ratios of the MoE layers and of the whole model."""
    shares = sorted({row["share"] for row in rows if row["way"] != "static"})
    heads = [f"{way}, z={share:g}" for way in WAYS[1:] for share in shares]
    lines = []
    workloads = list(dict.fromkeys((r["phase"], r["batch"], r["tokens"]) for r in rows))
    for phase, batch, tokens in workloads:
        found = {
            (r["way"], r["share"]): r
            for r in rows
            if (r["phase"], r["batch"], r["tokens"]) == (phase, batch, tokens)
        }
        prompts = f"{tokens} tokens" if batch == 1 else f"{batch} x {tokens} tokens"
        name = f"prefill, {prompts}" if phase == "prefill" else f"decode, batch {batch}"
        for part in ("moe", "model"):
            cells = [f"{found['static', 0.0][f'{part}_seconds'] * 1e3:.0f} ms"]
            cells += [f"{found[way, share][f'{part}_ratio']:.2f}" for way in WAYS[1:] for share in shares]
            lines.append([f"{name}: {'MoE layer' if part == 'moe' else 'whole layer'}", *cells])
    return markdown_table(["pass", "static", *heads], lines)


def main() -> int:
    """Command line of python -m tools.measure.serving."""
    options = parse()
    contest = Contest(
        options.hf, options.layers, DTYPES[options.dtype], options.device, rank=options.stand_in_rank
    )
    rows = measure(contest, options)
    if options.json:
        write_result("--json", options.json, json.dumps(rows, indent=1) + "\n")
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    run_worker(main)
