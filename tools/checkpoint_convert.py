#!/usr/bin/env python3
"""Convert checkpoints between Hugging Face and Megatron, or compare the two, tensor by tensor.

    python tools/checkpoint_convert.py hf-to-megatron --hf DIR --out DIR [--num-zero-experts N] [--seed S]
    python tools/checkpoint_convert.py hf-to-megatron --hf DIR --out DIR --zero-expert-routing paired
    python tools/checkpoint_convert.py megatron-to-hf --megatron DIR --hf-template DIR --out DIR
    python tools/checkpoint_convert.py verify --hf DIR --megatron DIR

One process, CPU, a few parameters in memory at a time. --out appears when it is complete; until then the work is in
OUT.partial, and after an interruption the same command goes on from there. See docs/conversion.md.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zeda_megatron.config.run import VERIFY_LEVELS
from zeda_megatron.config.zero_experts import ZERO_EXPERT_ROUTINGS, ZeroExpertConfig
from zeda_megatron.errors import run_main
from zeda_megatron.runtime import cpu


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; argparse itself reports wrong flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)

    to_megatron = commands.add_parser(
        "hf-to-megatron", help="import, optionally widening the routers", allow_abbrev=False
    )
    to_megatron.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face model folder")
    to_megatron.add_argument("--num-zero-experts", type=int, metavar="N", help="zero experts to add")
    to_megatron.add_argument("--zero-experts-type", default="zero", choices=["zero", "copy", "learned"])
    to_megatron.add_argument(
        "--zero-expert-routing",
        choices=ZERO_EXPERT_ROUTINGS,
        help="shared (default): N zero experts of all tokens; paired: one per real expert, N is not needed",
    )
    to_megatron.add_argument(
        "--paired-score",
        metavar="TERMS",
        help=f"terms of a pick's score under paired routing (default: {ZeroExpertConfig.paired_score})",
    )
    to_megatron.add_argument("--seed", type=int, default=1234, help="seed of the new router rows")

    to_hf = commands.add_parser(
        "megatron-to-hf", help="export, written on any parallel layout", allow_abbrev=False
    )
    to_hf.add_argument("--megatron", required=True, metavar="DIR", help="checkpoint, or one iteration of it")
    to_hf.add_argument(
        "--hf-template", required=True, metavar="DIR", help="config, tokenizer, generation config"
    )

    check = commands.add_parser("verify", help="compare; exit code 1 on any difference", allow_abbrev=False)
    check.add_argument("--hf", required=True, metavar="DIR")
    check.add_argument("--megatron", required=True, metavar="DIR")

    for command in (to_megatron, to_hf):
        command.add_argument("--out", required=True, metavar="DIR", help="new folder; appears when complete")
        command.add_argument(
            "--max-shard-bytes",
            type=int,
            default=2_000_000_000,
            metavar="BYTES",
            help="longest file of weights (default: %(default)s)",
        )
        command.add_argument(
            "--restart",
            action="store_true",
            help="throw away what an interrupted run has left in OUT.partial",
        )
        command.add_argument("--dtype", default="keep", choices=["keep", "bf16", "fp16", "fp32"])
        command.add_argument(
            "--overwrite", action="store_true", help="replace an existing checkpoint at --out"
        )
    for command in (to_hf, check):
        command.add_argument(
            "--verify-checkpoint",
            default="hash",
            choices=VERIFY_LEVELS,
            help="compare the checkpoint's files with its integrity.json first (default: hash)",
        )
    for command in (to_megatron, to_hf, check):
        command.add_argument(
            "--workers",
            type=_positive,
            default=min(4, os.cpu_count() or 1),
            metavar="N",
            help="threads (default: %(default)s)",
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        return run(args)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def run(args: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code."""
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")
    cpu.install()
    from zeda_megatron.convert import convert
    from zeda_megatron.data.tokenizers import has_tokenizer

    started = time.monotonic()
    if args.command == "verify":
        differences = convert.verify(
            args.hf, args.megatron, workers=args.workers, verify_checkpoint=args.verify_checkpoint
        )
        for line in differences[:10]:
            print(f"different: {line}", file=sys.stderr)
        if differences:
            print(f"{len(differences)} tensors differ", file=sys.stderr)
            return 1
        print(f"all tensors of {args.hf} are in {args.megatron}, bit for bit")
        return 0
    if args.command == "hf-to-megatron":
        summary = convert.hf_to_megatron(
            args.hf,
            args.out,
            args.num_zero_experts,
            args.zero_experts_type,
            args.seed,
            args.dtype,
            args.overwrite,
            args.zero_expert_routing,
            args.paired_score,
            max_shard_bytes=args.max_shard_bytes,
            workers=args.workers,
            restart=args.restart,
        )
    else:
        summary = convert.megatron_to_hf(
            args.megatron,
            args.hf_template,
            args.out,
            args.max_shard_bytes,
            args.dtype,
            args.overwrite,
            workers=args.workers,
            restart=args.restart,
            verify_checkpoint=args.verify_checkpoint,
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"wrote {args.out}: {summary.tensors} tensors, {summary.nbytes / 1e9:.3f} GB, "
        f"{summary.zero.num_zero_experts} zero experts per layer, {time.monotonic() - started:.1f} s, "
        f"peak memory {peak:.2f} GB"
    )
    if args.command == "hf-to-megatron" and not has_tokenizer(Path(args.hf)):
        print(f"note: {args.hf} has no tokenizer: training will need --tokenizer-model")
    return 0


if __name__ == "__main__":
    run_main(main)
