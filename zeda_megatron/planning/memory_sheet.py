"""GPU memory of a recipe on the terminal, as JSON or as a table row: tools/memory.py."""

from __future__ import annotations

import json

from ..text_table import text_table
from .memory import GIB, StageMemory, estimate
from .memory_advice import advice, worst_stage
from .memory_command import Command, read_command


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
        "worst_stage_at_worst_load": worst.stage,
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
    other, stage, about = sheet["worst_stage_at_worst_load"], sheet["stages"][number], command.about
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
    ]
    rows = [["", "even load", "worst load"]]
    rows += [_sizes(part, size, size) for part, size in stage["standing"].items()]
    for phase, parts in stage["phases"].items():
        rows.append([phase + ("  <- peak" if phase == stage["peak"][0] else "")])
        rows += [_sizes(f"  {part}", *loads) for part, loads in parts.items() if loads[1]]
    rows.append(_sizes("reserve", *stage["reserve"]))
    rows.append(_sizes("in all, at the peak", sheet["total"], sheet["total_at_worst_load"]))
    out += [
        *text_table(rows, indent="  "),
        f"{sheet['verdict']} ({about.gpu_memory:g} GiB)"
        + ("" if other == number else f"; at the worst load stage {other + 1} needs most"),
    ]
    changes = [
        [
            change["flags"],
            f"{change['total']:.2f}",
            "fits at even load" if change["fits"] else "not enough alone",
        ]
        for change in sheet["changes"][:6]
    ]
    out += [
        *text_table(changes, "lrl", "  "),
        "Weights, gradients, optimizer states, teacher: counted. The rest: estimated, not measured on a GPU.",
        f"Assumed: Transformer Engine, no pick dropped (zero share {about.zero_share:g}), prompts of at most "
        f"{about.prompt_tokens:,} tokens,",
        f"reserve {about.context_gib:g} GiB for CUDA and NCCL + {about.fragmentation:.0%} lost by the allocator. "
        "The optimizer cannot be offloaded.",
    ]
    return "\n".join(out)


def _sizes(part: str, even: float, worst: float) -> list[str]:
    return [part, f"{even:.2f}", f"{worst:.2f}"]


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


def main(argv: list[str]) -> int:
    """Entry point."""
    command = read_command(argv)
    sheet = memory_sheet(command)
    forms = {
        "json": lambda: json.dumps(sheet, indent=1),
        "markdown": lambda: markdown_row(sheet),
        "text": lambda: format_sheet(command, sheet),
    }
    print(forms[command.form]())
    return 0
