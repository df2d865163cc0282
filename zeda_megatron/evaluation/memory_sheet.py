"""GPU memory of a recipe on the terminal, as JSON or as a table row: tools/memory.py."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace

from ..arguments import parse
from ..config import ZeroExpertConfig
from ..errors import UserError
from ..models.architecture import Architecture, read_architecture
from ..models.build import check_layout
from ..training.options import GROUPS, Options
from .memory import GIB, Assumptions, StageMemory, estimate
from .memory_advice import advice, worst_stage


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
        prog="memory.py",
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
    options = Options(**parse(rest, GROUPS, prog="memory.py"))
    # Files come later, and this machine may lack the GPUs' libraries.
    replace(
        options,
        data=replace(options.data, data_path=options.data.data_path or ["data"]),
        generate=replace(options.generate, rollout_path=options.generate.rollout_path or "rollouts"),
        model=replace(options.model, moe_token_dispatcher_type="alltoall", moe_permute_fusion=False),
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


def memory_sheet(command: Command) -> dict:
    """All figures as a JSON-ready dict, in GiB."""
    stages = estimate(command.options, command.arch, command.zero, command.about)
    worst, peak = worst_stage(stages, worst=True), worst_stage(stages)
    limit = command.about.gpu_memory
    even, uneven = peak.total() / GIB, worst.total(True) / GIB
    fits = "fits" if uneven <= limit else "fits at even load" if even <= limit else "does not fit"
    found = [] if uneven <= limit else advice(command.options, command.arch, command.zero, command.about)
    return {
        "gpus": command.about.gpus,
        "gpu_memory": limit,
        "stages": [_stage(stage) for stage in stages],
        "worst_stage": peak.stage,
        "total": even,
        "total_at_worst_load": uneven,
        "verdict": fits,
        "changes": [vars(change) for change in found],
    }


def _stage(stage: StageMemory) -> dict:
    return {
        "standing": {part: size / GIB for part, size in stage.standing.items()},
        "phases": {
            phase: {part: [load.average / GIB, load.worst / GIB] for part, load in parts.items()}
            for phase, parts in stage.phases.items()
        },
        "peak": [stage.peak_phase(), stage.peak_phase(True)],
        "reserve": [stage.reserve() / GIB, stage.reserve(True) / GIB],
        "total": [stage.total() / GIB, stage.total(True) / GIB],
    }


def format_sheet(command: Command, sheet: dict) -> str:
    """The dict of `memory_sheet` as a table for the terminal."""
    model, parallel, data = command.options.model, command.options.parallel, command.options.data
    number = sheet["worst_stage"]
    stage, about = sheet["stages"][number], command.about
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "VPP": parallel.virtual_pipeline_model_parallel_size,
        "CP": parallel.context_parallel_size,
        "EP": parallel.expert_model_parallel_size,
        "ETP": parallel.expert_tensor_parallel_size,
        "DP": about.gpus // parallel.model_parallel_size,
    }
    layout = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "one rank"
    out = [
        f"{command.arch.name}, stage {model.stage}, {about.gpus} GPUs of {about.gpu_memory:g} GiB, {layout}, "
        f"rows of {data.seq_length:,} tokens",
        f"GiB on each GPU of pipeline stage {number + 1} of {len(sheet['stages'])}"
        + (", which needs most" if len(sheet["stages"]) > 1 else ""),
        f"  {'':34}{'even load':>12}{'worst load':>12}",
        *(f"  {part:34}{size:12.2f}{size:12.2f}" for part, size in stage["standing"].items()),
    ]
    for phase, parts in stage["phases"].items():
        peak = "  <- peak" if phase == stage["peak"][0] else ""
        out.append(f"  {phase}{peak}")
        out += [f"    {part:32}{a:12.2f}{w:12.2f}" for part, (a, w) in parts.items() if w]
    out += [
        f"  {'reserve':34}{stage['reserve'][0]:12.2f}{stage['reserve'][1]:12.2f}",
        f"  {'in all, at the peak':34}{sheet['total']:12.2f}{sheet['total_at_worst_load']:12.2f}",
        f"{sheet['verdict']} ({about.gpu_memory:g} GiB)",
    ]
    for change in sheet["changes"][:6]:
        left = "fits at even load" if change["fits"] else "not enough alone"
        out.append(f"  {change['flags']:58}{change['total']:8.2f}  {left}")
    out += [
        "Weights, gradients, optimizer states, teacher: counted. The rest: estimated, not measured on a GPU.",
        f"Assumed: Transformer Engine, no pick dropped (zero share {about.zero_share:g}), prompts of at most "
        f"{about.prompt_tokens:,} tokens,",
        f"reserve {about.context_gib:g} GiB for CUDA and NCCL + {about.fragmentation:.0%} lost by the allocator. "
        "The optimizer cannot be offloaded.",
    ]
    return "\n".join(out)


COLUMNS = (
    "weights",
    "gradients",
    "optimizer",
    "teacher",
    "peak phase",
    "adds",
    "reserve",
    "sum",
    "at worst load",
)
"""Columns of a table row (and the verdict)."""


def markdown_row(sheet: dict) -> str:
    """Cells of `COLUMNS` and the verdict, of the stage that needs most at even load."""
    stage = sheet["stages"][sheet["worst_stage"]]
    peak = stage["peak"][0]
    standing = {part.split()[0]: size for part, size in stage["standing"].items()}
    numbers = [standing.get(part, 0.0) for part in COLUMNS[:4]]
    adds = sum(load[0] for load in stage["phases"][peak].values())
    cells = [f"{size:.1f}" for size in numbers] + [peak, f"{adds:.1f}", f"{stage['reserve'][0]:.1f}"]
    cells += [f"{sheet['total']:.1f}", f"{sheet['total_at_worst_load']:.1f}", sheet["verdict"]]
    return " | ".join(cells)


def main(argv: list[str] | None = None) -> int:
    """Entry point of tools/memory.py."""
    command = read_command(sys.argv[1:] if argv is None else argv)
    sheet = memory_sheet(command)
    forms = {
        "json": lambda: json.dumps(sheet, indent=1),
        "markdown": lambda: markdown_row(sheet),
        "text": lambda: format_sheet(command, sheet),
    }
    print(forms[command.form]())
    return 0
