"""How many packed rows make a step of 128 conversations, and how many steps make an epoch: tools/plan.py.

Prints the flags for launch/pretrain_zeda.sh. Packs exactly as the training does (same --seq-length, same --seed).
"""

from __future__ import annotations

import argparse
import math
import sys

from .conversation import tokenize_rollouts
from .packing import PackedDataset
from .prompts import load_rollouts
from .tokenizers import load_tokenizer


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="plan.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data-path", required=True, nargs="+", metavar="FILE", help="rollout files (jsonl)")
    parser.add_argument("--tokenizer-model", required=True, metavar="DIR", help="HF folder of the model")
    parser.add_argument("--seq-length", type=int, default=65536, help="tokens of a row")
    parser.add_argument("--conversations", type=int, default=128, help="conversations a step")
    parser.add_argument(
        "--data-parallel-size", type=int, default=2, help="GPUs / tensor / pipeline / context size"
    )
    parser.add_argument("--seed", type=int, default=1234, help="seed of the data order")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(arguments)


def main() -> int:
    """Entry point of tools/plan.py."""
    args = parse()
    tokenizer = load_tokenizer(args.tokenizer_model)
    name = ", ".join(args.data_path)
    samples = list(
        tokenize_rollouts(load_rollouts(args.data_path), tokenizer, args.seq_length, "error", name)
    )
    rows = PackedDataset(samples, args.seq_length, tokenizer.pad_id, args.seed).rows_in_epoch(0)
    tokens = sum(len(sample.tokens) for sample in samples)
    wanted = args.conversations * rows / len(samples) / args.data_parallel_size
    batch = max(1, round(wanted)) * args.data_parallel_size
    print(
        f"{len(samples)} conversations, {tokens / len(samples):.0f} tokens on average, longest "
        f"{max(len(sample.tokens) for sample in samples)}; {rows} rows of {args.seq_length}, "
        f"{tokens / rows / args.seq_length:.1%} full",
        file=sys.stderr,
    )
    print(f"--global-batch-size {batch} --train-iters {math.ceil(rows / batch)}")
    return 0
