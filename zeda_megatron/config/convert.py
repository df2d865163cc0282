"""Options of `zeda convert`. Field names are arguments of the functions in `convert/`; each is a flag and a key."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from ..errors import UserError, shown
from .arguments import Count, check_choices, parse, require
from .run import VERIFY_LEVELS, Watched
from .zero_experts import ZERO_EXPERT_ROUTINGS, ZERO_EXPERT_TYPES

_WORKERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class _Conversion(Watched):
    """What every command has."""

    workers: Count = _WORKERS
    """Threads; each holds one parameter."""

    def validate(self) -> None:
        """Raise `UserError` naming the flag that is missing or cannot work."""
        check_choices(self)
        folders = ("hf", "megatron", "hf_template", "out")
        require(self, *(field.name for field in fields(self) if field.name in folders))


@dataclass(frozen=True)
class _Written(_Conversion):
    """What a command has that writes a folder."""

    out: str | None = None
    """New folder; it appears when it is complete. Until then the work is in OUT.partial."""

    max_shard_bytes: Count = 2_000_000_000
    """Longest file of weights."""

    dtype: Literal["keep", "bf16", "fp16", "fp32"] = "keep"
    """Type of the weights."""

    overwrite: bool = False
    """Replace an existing checkpoint at --out."""

    restart: bool = False
    """Throw away what an interrupted run has left in OUT.partial."""


@dataclass(frozen=True)
class ImportOptions(_Written):
    """Hugging Face to Megatron, optionally with wider routers."""

    hf: str | None = None
    """Hugging Face model folder."""

    num_zero_experts: int | None = None
    """Zero experts to add to every layer."""

    zero_experts_type: Literal[ZERO_EXPERT_TYPES] = "zero"
    """What they give: nothing, their input, or a bias that learns."""

    zero_expert_routing: Literal[ZERO_EXPERT_ROUTINGS] | None = None
    """shared (default): N zero experts of all tokens; paired: one per real expert, N is not needed."""

    paired_score: str | None = None
    """Terms of a pick's score under paired routing, joined by '+'. Default: weight+head+residual."""

    seed: int = 1234
    """Seed of the new router rows."""

    mtp: bool = False
    """Make the head of multi-token prediction a part of the Megatron model, with zero experts like all layers, so that
    training adapts it (--mtp-loss-scale). Off: its tensors are carried along as they are."""


@dataclass(frozen=True)
class ExportOptions(_Written):
    """Megatron to Hugging Face, whatever layout wrote the checkpoint."""

    megatron: str | None = None
    """Checkpoint, or one iteration of it."""

    hf_template: str | None = None
    """Folder that gives config, tokenizer and generation config."""

    verify_checkpoint: Literal[VERIFY_LEVELS] = "hash"
    """Compare the checkpoint's files with its integrity.json first: hash, size, none."""

    adapters: Literal["merged", "beside"] = "merged"
    """Low-rank adapters of a run with --trainable lora: merged into the weights, or beside them in OUT/adapter, as
    peft opens it."""


@dataclass(frozen=True)
class VerifyOptions(_Conversion):
    """Compare both, tensor by tensor; exit code 1 on any difference."""

    hf: str | None = None
    """Hugging Face model folder."""

    megatron: str | None = None
    """Checkpoint, or one iteration of it."""

    verify_checkpoint: Literal[VERIFY_LEVELS] = "hash"
    """Compare the checkpoint's files with its integrity.json first: hash, size, none."""


COMMANDS = {"hf-to-megatron": ImportOptions, "megatron-to-hf": ExportOptions, "verify": VerifyOptions}
USAGE = """usage: zeda convert COMMAND [flags]; every command has --help

    zeda convert hf-to-megatron --hf DIR --out DIR [--num-zero-experts N] [--seed S] [--mtp]
    zeda convert hf-to-megatron --hf DIR --out DIR --zero-expert-routing paired
    zeda convert megatron-to-hf --megatron DIR --hf-template DIR --out DIR
    zeda convert verify --hf DIR --megatron DIR

One process, CPU, a few parameters in memory at a time. --out appears when it is complete; until then the work is in
OUT.partial, and after an interruption the same command goes on from there. See docs/conversion.md."""


def read_conversion(argv: Sequence[str]) -> ImportOptions | ExportOptions | VerifyOptions:
    """The options of a command line; `--help` is printed and ends the program. Raises `UserError` naming the flag."""
    name = argv[0] if argv else "nothing"
    if name in ("-h", "--help"):
        print(USAGE)
        sys.exit()
    if name not in COMMANDS:
        raise UserError(f"zeda convert: {shown(name)} is not a command; choose one of {', '.join(COMMANDS)}")
    options = parse(argv[1:], {name: COMMANDS[name]}, prog=f"zeda convert {name}")[name]
    options.validate()
    return options
