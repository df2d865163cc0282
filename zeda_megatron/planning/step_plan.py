"""How many packed rows make a step of 128 conversations, and how many steps make an epoch: zeda plan steps.

Prints the flags for launch/pretrain_zeda.sh. Packs exactly as the training does, given the flags that training gets.
"""

from __future__ import annotations

import argparse
import math
import sys

from ..config.run import DataOptions
from ..data.chat_tokenizer import RUN_DAY
from ..data.conversation import OVERLONG
from ..data.rows import training_rows
from ..data.tokenizers import KINDS, load_tokenizer
from ..errors import UserError


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="zeda plan steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data-path", required=True, nargs="+", metavar="FILE", help="rollout files (jsonl)")
    parser.add_argument("--tokenizer-model", required=True, metavar="DIR", help="HF folder of the model")
    parser.add_argument("--tokenizer-type", default="auto", choices=KINDS, help="as for the training")
    parser.add_argument("--chat-template-file", metavar="FILE", help="as for the training")
    parser.add_argument("--seq-length", type=int, default=65536, help="tokens of a row")
    parser.add_argument("--overlong", default="error", choices=OVERLONG, help="longer conversations")
    parser.add_argument("--conversations", type=int, default=128, help="conversations a step")
    parser.add_argument(
        "--data-parallel-size", type=int, default=1, help="GPUs / tensor / pipeline / context size"
    )
    parser.add_argument("--context-parallel-size", type=int, default=1, help="as for the training")
    parser.add_argument("--pad-seq-to-mult", type=int, default=0, help="as for the training")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the data order")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(arguments)
    for name in ("conversations", "data_parallel_size", "context_parallel_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    return args


def main(argv: list[str]) -> int:
    """Entry point."""
    args = parse(argv)
    tokenizer = load_tokenizer(
        args.tokenizer_model, args.tokenizer_type, args.chat_template_file, day=RUN_DAY
    )
    for line in tokenizer.notes:
        _say(line)
    data = DataOptions(
        data_path=args.data_path,
        seq_length=args.seq_length,
        overlong=args.overlong,
        pad_seq_to_mult=args.pad_seq_to_mult,
    )
    packed = training_rows(data, args.context_parallel_size, args.seed, tokenizer, _say)
    rows, count, ranks = packed.rows_in_epoch(0), packed.num_samples, args.data_parallel_size
    lengths = packed.lengths()
    batch = max(1, round(args.conversations * rows / count / ranks)) * ranks
    print(
        f"{count} conversations, {sum(lengths) / count:.0f} tokens on average, longest {max(lengths)}; {rows} rows of "
        f"{args.seq_length}, {sum(lengths) / rows / args.seq_length:.1%} full; for {ranks} data-parallel rank"
        f"{'s' * (ranks > 1)} (--data-parallel-size)",
        file=sys.stderr,
    )
    if batch > rows:
        _say(
            f"one step takes {batch} rows and the files give {rows}: it meets conversations more than once; lower "
            "--conversations, or give more"
        )
    print(f"--global-batch-size {batch} --train-iters {math.ceil(rows / batch)}")
    return 0


def _say(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)
