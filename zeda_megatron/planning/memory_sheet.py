"""GPU memory of a recipe on the terminal, as JSON or as a table row: `zeda plan memory`.

The command line has GPUs, assumptions, and the flags and files of a training run. Where the recipe does not fit, single
changes are tried, and the total of each stands beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..config.options import Options, read_options
from ..config.parallel import ParallelConfig
from ..config.zero_experts import ZeroExpertConfig
from ..errors import UserError
from ..models.architecture import Architecture, read_architecture
from ..models.build import check_layout
from ..models.hf_config import zero_experts_of
from ..text_table import text_table
from .cost_sheet import add_paired_flags, paired_zero_experts
from .memory import GIB, Assumptions, StageMemory, estimate


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


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        allow_abbrev=False,
        description="GPU memory of a training recipe: will it fit, and what to change if it does not",
        epilog="All other flags, --config FILE.yaml among them, are those of launch/pretrain_zeda.sh.",
    )
    add, default = parser.add_argument, Assumptions(gpus=8)
    add("--hf", required=True, metavar="DIR", help="folder with a HF config.json (no weights needed)")
    add("--gpus", type=int, required=True, help="GPUs of the whole run")
    add("--gpu-memory", type=float, default=default.gpu_memory, metavar="GIB", help="of one GPU (80)")
    add("--zero-share", type=float, default=0.0, metavar="Z", help="share of zero picks (0: the safe end)")
    add_paired_flags(parser)
    add("--prompt-tokens", type=int, default=default.prompt_tokens, metavar="T", help="longest prompt (1024)")
    add("--context", type=float, default=default.context_gib, metavar="GIB", help="CUDA context, NCCL (1.5)")
    add("--fragmentation", type=float, default=default.fragmentation, metavar="SHARE", help="(0.05)")
    add("--json", action="store_true", help="print JSON")
    add("--markdown", action="store_true", help="print one row of a table")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def read_command(argv: list[str], prog: str = "zeda plan memory") -> Command:
    """Read the command line of `prog`. Raises `UserError` for what training would refuse too."""
    mine, rest = _parser(prog).parse_known_args(argv)
    for flag, value in (("--gpus", mine.gpus), ("--prompt-tokens", mine.prompt_tokens)):
        if value < 1:
            raise UserError(f"{flag} {value} must be at least 1")
    for flag, value in (("--zero-share", mine.zero_share), ("--fragmentation", mine.fragmentation)):
        if not 0 <= value < 1:
            raise UserError(f"{flag} {value} must be at least 0 and below 1")
    if not mine.gpu_memory > 0 or not mine.context >= 0:
        raise UserError("--gpu-memory must be above 0 and --context not negative")
    options = read_options(rest, prog)
    options = replace(  # files come later
        options,
        data=replace(options.data, data_path=options.data.data_path or ["data"]),
        generate=replace(options.generate, rollout_path=options.generate.rollout_path or "rollouts"),
    )
    options.validate()
    arch = read_architecture(mine.hf)
    if options.distill.mtp_loss_scale:
        arch = arch.with_mtp_head("--mtp-loss-scale")
    check_layout(arch, options.parallel)
    model, experts = options.model, arch.megatron["num_moe_experts"]
    has, number = zero_experts_of(arch.hf), model.num_zero_experts
    mine.paired |= model.zero_expert_routing == "paired"
    zero = paired_zero_experts(mine, experts, arch.megatron["moe_ffn_hidden_size"], has)
    if zero is None:
        if number is None:  # as many as the config has, else the paper's half
            number = has.num_zero_experts or experts // 2
        zero = ZeroExpertConfig(number, model.zero_experts_type or "zero")
    zero = model.zero(zero)
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
        "on_host": stage.on_host / GIB,
        "total": [stage.total() / GIB, stage.total(True) / GIB],
    }


def format_sheet(command: Command, sheet: dict) -> str:
    """The dict of `memory_sheet` as a table for the terminal."""
    model, parallel, data = command.options.model, command.options.parallel, command.options.data
    number = sheet["worst_stage"]
    other, stage, about = sheet["worst_stage_at_worst_load"], sheet["stages"][number], command.about
    out = [
        f"{command.arch.name}, stage {model.stage}, {about.gpus} GPUs of {about.gpu_memory:g} GiB, "
        f"{layout_name(parallel, about.gpus)}, rows of {data.seq_length:,} tokens",
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
        f"reserve {about.context_gib:g} GiB for CUDA and NCCL + {about.fragmentation:.0%} lost by the allocator.",
    ]
    if stage["on_host"]:
        out.append(f"In host memory, for each GPU: {stage['on_host']:.2f} GiB.")
    return "\n".join(out)


def layout_name(parallel: ParallelConfig, gpus: int) -> str:
    """`TP2 EP8 DP4`."""
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "VPP": parallel.virtual_pipeline_model_parallel_size,
        "CP": parallel.context_parallel_size,
        "EP": parallel.expert_model_parallel_size,
        "ETP": parallel.expert_tensor_parallel_size,
        "DP": gpus // parallel.model_parallel_size,
    }
    return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "one rank"


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


@dataclass(frozen=True)
class Change:
    """One change to a recipe."""

    flags: str
    """What to add to the command."""
    total: float
    """GiB of the worst stage then, at even expert load."""
    fits: bool
    """Whether that is enough."""


def worst_stage(stages: list[StageMemory], worst: bool = False) -> StageMemory:
    """The stage that needs most."""
    return max(stages, key=lambda stage: stage.total(worst))


def advice(options: Options, arch: Architecture, zero: ZeroExpertConfig, about: Assumptions) -> list[Change]:
    """Single changes that need less than the recipe, the best first."""
    now = worst_stage(estimate(options, arch, zero, about)).total() / GIB
    made = []
    for flags, changed, gpus in _candidates(options, arch, about):
        try:
            check_layout(arch, changed.parallel)
            total = worst_stage(estimate(changed, arch, zero, replace(about, gpus=gpus))).total() / GIB
        except UserError:
            continue  # a layout that this model or these GPUs cannot have
        if total < now - 0.1:
            made.append(Change(flags, total, total <= about.gpu_memory))
    return sorted(made, key=lambda change: (not change.fits, change.total))


def _candidates(
    options: Options, arch: Architecture, about: Assumptions
) -> Iterator[tuple[str, Options, int]]:
    """(flags, options, GPUs) of changes that may help; what has been chosen already is left out."""
    model, distill, parallel = options.model, options.distill, options.parallel
    if model.stage != "0":
        if model.recompute_granularity != "full":
            changed = replace(model, recompute_granularity="full")
            yield "--recompute-granularity full", replace(options, model=changed), about.gpus
        if not options.optimizer.use_distributed_optimizer:
            changed = replace(options.optimizer, use_distributed_optimizer=True)
            yield "--use-distributed-optimizer", replace(options, optimizer=changed), about.gpus
        elif model.bf16 and not options.optimizer.optimizer_cpu_offload:
            changed = replace(options.optimizer, optimizer_cpu_offload=True)
            yield "--optimizer-cpu-offload", replace(options, optimizer=changed), about.gpus
        if distill.teacher_memory == "own":
            changed = replace(distill, teacher_memory="offload", teacher_schedule="ahead")
            more = " --teacher-schedule ahead" if distill.teacher_schedule != "ahead" else ""
            yield f"--teacher-memory offload{more}", replace(options, distill=changed), about.gpus
        if (
            distill.teacher_schedule == "ahead"
            and distill.teacher_memory != "offload"
            and not parallel.virtual_stages
        ):
            changed = replace(distill, teacher_schedule="alongside")
            yield "--teacher-schedule alongside", replace(options, distill=changed), about.gpus
        if model.trainable == "all":
            changed = replace(
                options,
                model=replace(model, trainable="router"),
                distill=replace(distill, teacher_memory="shared"),
            )
            yield "--trainable router --teacher-memory shared", changed, about.gpus
    rows = options.generate.generate_batch_size
    while model.stage in ("0", "2") and rows > 1:
        rows //= 2
        changed = replace(options.generate, generate_batch_size=rows)
        yield f"--generate-batch-size {rows}", replace(options, generate=changed), about.gpus
    for flag, name in (
        ("--tensor-model-parallel-size", "tensor_model_parallel_size"),
        ("--context-parallel-size", "context_parallel_size"),
        ("--expert-model-parallel-size", "expert_model_parallel_size"),
        ("--pipeline-model-parallel-size", "pipeline_model_parallel_size"),
    ):
        size = 2 * getattr(parallel, name)
        changed, more = replace(parallel, **{name: size}), ""
        layers = arch.megatron["num_layers"]
        if name.startswith("pipeline") and layers % size:
            first = layers - (size - 1) * (layers // size)
            changed = replace(changed, decoder_first_pipeline_num_layers=first)
            more = f" --decoder-first-pipeline-num-layers {first}"
        yield f"{flag} {size}{more}", replace(options, parallel=changed), about.gpus
    for times in (2, 4, 8):
        yield f"--gpus {times * about.gpus}", options, times * about.gpus
