"""The command line of tools/memory.py: GPUs, assumptions, and the flags and files of a training run."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from ..config.options import Options, read_options
from ..config.zero_experts import ZeroExpertConfig
from ..errors import UserError
from ..models.architecture import Architecture, read_architecture
from ..models.build import check_layout
from .memory import Assumptions


@dataclass(frozen=True)
class Command:
    """What was asked for."""

    options: Options
    """The recipe, as training reads it."""
    arch: Architecture
    """The model."""
    zero: ZeroExpertConfig
    """Its zero experts."""
    about: Assumptions
    """GPUs and what no option says."""
    form: str
    """text, json or markdown."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zeda plan memory",
        allow_abbrev=False,
        description="GPU memory of a training recipe: will it fit, and what to change if it does not",
        epilog="All other flags, --config FILE.yaml among them, are those of launch/pretrain_zeda.sh.",
    )
    add, default = parser.add_argument, Assumptions(gpus=8)
    add("--hf", required=True, metavar="DIR", help="folder with a HF config.json (no weights needed)")
    add("--gpus", type=int, required=True, help="GPUs of the whole run")
    add("--gpu-memory", type=float, default=default.gpu_memory, metavar="GIB", help="of one GPU (80)")
    add("--zero-share", type=float, default=0.0, metavar="Z", help="share of zero picks (0: the safe end)")
    add("--prompt-tokens", type=int, default=default.prompt_tokens, metavar="T", help="longest prompt (1024)")
    add("--context", type=float, default=default.context_gib, metavar="GIB", help="CUDA context, NCCL (1.5)")
    add("--fragmentation", type=float, default=default.fragmentation, metavar="SHARE", help="(0.05)")
    add("--json", action="store_true", help="print JSON")
    add("--markdown", action="store_true", help="print one row of a table")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def read_command(argv: list[str]) -> Command:
    """Read the command line. Raises `UserError` for what training would refuse too."""
    mine, rest = _parser().parse_known_args(argv)
    for flag, value in (("--gpus", mine.gpus), ("--prompt-tokens", mine.prompt_tokens)):
        if value < 1:
            raise UserError(f"{flag} {value} must be at least 1")
    for flag, value in (("--zero-share", mine.zero_share), ("--fragmentation", mine.fragmentation)):
        if not 0 <= value < 1:
            raise UserError(f"{flag} {value} must be at least 0 and below 1")
    if not mine.gpu_memory > 0 or not mine.context >= 0:
        raise UserError("--gpu-memory must be above 0 and --context not negative")
    options = read_options(rest, "zeda plan memory")
    # Files come later.
    replace(
        options,
        data=replace(options.data, data_path=options.data.data_path or ["data"]),
        generate=replace(options.generate, rollout_path=options.generate.rollout_path or "rollouts"),
    ).validate()
    arch = read_architecture(mine.hf)
    check_layout(arch, options.parallel)
    model, experts = options.model, arch.megatron["num_moe_experts"]
    routing, number = model.zero_expert_routing or "shared", model.num_zero_experts
    if number is None:  # as many as the config has, else the paper's half
        number = experts if routing == "paired" else arch.num_zero_experts or experts // 2
    zero = model.zero(number, model.zero_experts_type or "zero", routing, model.paired_score)
    about = Assumptions(
        mine.gpus, mine.gpu_memory, mine.zero_share, mine.prompt_tokens, mine.context, mine.fragmentation
    )
    return Command(
        options, arch, zero, about, "json" if mine.json else "markdown" if mine.markdown else "text"
    )
