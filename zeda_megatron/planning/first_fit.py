"""The first recipe that fits given GPUs, and what it gives up for that: `zeda plan fit`.

The command line is that of `zeda plan memory`. What is given up is ordered (`RUNGS`): first the places of teacher and
optimizer, which costs time alone, then what trains. Under each, rows get shorter while the tokens of a step stay
what they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from ..config.options import Options
from ..errors import UserError
from ..models.build import check_layout
from ..text_table import text_table
from .memory import GIB, estimate
from .memory_sheet import Command, layout_name, read_command, worst_stage


@dataclass(frozen=True)
class Rung:
    """One kind of recipe."""

    gives_up: str
    """In words."""
    trainable: str | None = None
    """What trains; None: what the recipe says."""
    teacher: str | None = None
    """Its memory mode; None: the recipe's."""
    optimizer: bool = False
    """The optimizer's states move to host memory."""
    shortens: bool = False
    """Answers that the student samples get shorter too."""


LORA, FEW = ("lora", "shared"), ("router+norms", "shared")
RUNGS = (
    Rung("nothing"),
    Rung("the teacher waits in host memory between steps", teacher="offload"),
    Rung("so do the optimizer's states, which are updated there", teacher="offload", optimizer=True),
    Rung("most weights: adapters (LoRA) and routers train", *LORA),
    Rung("adapters too: routers and norms train", *FEW),
    Rung("long answers; adapters and routers train", *LORA, shortens=True),
    Rung("long answers; routers and norms train", *FEW, shortens=True),
)
"""Each in place of the one before."""
SHORTEST_ROW = 4096
"""Tokens; shorter rows than that are not tried."""


@dataclass(frozen=True)
class Try:
    """The best layout of one kind of recipe."""

    gives_up: str
    """In words."""
    flags: tuple[str, ...]
    """What to add to the command."""
    layout: str
    """`TP2 EP8`."""
    row: int
    """Tokens of a row."""
    total: float
    """GiB of the stage that needs most, experts evenly loaded."""
    total_at_worst_load: float
    """The same where every pick that can go to one GPU's experts does."""
    fits: bool
    """Whether `total` is not above what a GPU has."""


def first_fit(command: Command) -> list[Try]:
    """The best of each kind of recipe, in the order of what they give up, to the first that fits.

    Under each kind that fits, the longest rows and then the layout that splits least.
    """
    made = []
    for rung in RUNGS:
        stage, options = command.options.model.stage, command.options
        if (rung.teacher and stage not in ("1", "2")) or (rung.shortens and stage != "2"):
            continue
        if rung.trainable:
            options = replace(options, model=replace(options.model, trainable=rung.trainable))
        if rung.teacher:
            schedule = "ahead" if rung.teacher == "offload" else options.distill.teacher_schedule
            teacher = replace(options.distill, teacher_memory=rung.teacher, teacher_schedule=schedule)
            options = replace(options, distill=teacher)
        if rung.optimizer:
            offloaded = replace(
                options.optimizer, use_distributed_optimizer=True, optimizer_cpu_offload=options.model.bf16
            )
            options = replace(options, optimizer=offloaded)
        found = _best(command, options, rung)
        if found is not None:
            made.append(found)
            if found.fits:
                break
    return made


def _best(command: Command, options: Options, rung: Rung) -> Try | None:
    """None: the model has no layout on these GPUs."""
    least = None
    for shorter in _easier(options, rung.shortens):
        fitting = None
        for one in (_tried(command, changed, rung.gives_up) for changed in _layouts(command, shorter)):
            if one is None:
                continue
            if one.total_at_worst_load <= command.about.gpu_memory:
                return one
            if fitting is None and one.fits:
                fitting = one
            if least is None or one.total < least.total:
                least = one
        if fitting is not None:
            return fitting
    return least


def _easier(options: Options, shortens: bool) -> Iterator[Options]:
    """The same recipe, then ways to make it need less that change nothing that is learned: recomputation, fewer answers
    at a time, shorter rows. `shortens`: then shorter answers, half a row at most."""
    yield options
    if options.model.stage in ("pretrain", "1", "2"):
        model = replace(options.model, recompute_granularity="full")
        sharded = replace(options.optimizer, use_distributed_optimizer=True)
        options = replace(options, model=model, optimizer=sharded)
        yield options
    times = 1
    while options.model.stage in ("pretrain", "1") and options.data.seq_length // times > SHORTEST_ROW:
        times *= 2
        data = replace(options.data, seq_length=options.data.seq_length // times)
        rows = replace(options.optimizer, global_batch_size=options.optimizer.global_batch_size * times)
        yield replace(options, data=data, optimizer=rows)
    answers = options.generate.generate_batch_size
    while options.model.stage in ("0", "2") and answers > 1:
        answers //= 2
        options = replace(options, generate=replace(options.generate, generate_batch_size=answers))
        yield options
    length = options.data.seq_length
    while shortens and length > SHORTEST_ROW:
        length //= 2
        tokens = min(options.generate.max_new_tokens, length // 2)
        yield replace(
            options,
            data=replace(options.data, seq_length=length),
            generate=replace(options.generate, max_new_tokens=tokens),
        )


def _layouts(command: Command, options: Options) -> Iterator[Options]:
    """All that these GPUs can have: the recipe's own, then those first that split a sequence or a layer over fewer
    ranks."""
    gpus, layers = command.about.gpus, command.arch.megatron["num_layers"]
    sizes = [size for size in range(1, gpus + 1) if gpus % size == 0]
    few = [size for size in sizes if size & (size - 1) == 0]
    found = []
    for tp, cp, pp, ep in product(few, few, sizes, sizes):
        if gpus % (tp * cp * pp) or gpus % (ep * pp):
            continue
        uneven = layers - (pp - 1) * (layers // pp) if layers % pp else None
        parallel = replace(
            options.parallel,
            tensor_model_parallel_size=tp,
            context_parallel_size=cp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=1,
            decoder_first_pipeline_num_layers=uneven,
            decoder_last_pipeline_num_layers=None,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=1,
        )
        found.append(
            (parallel != options.parallel, tp * cp, pp, -ep, cp, replace(options, parallel=parallel))
        )
    return (one[-1] for one in sorted(found, key=lambda one: one[:-1]))


def _tried(command: Command, options: Options, gives_up: str) -> Try | None:
    """None: the model, the GPUs or the rows cannot have this layout."""
    try:
        check_layout(command.arch, options.parallel)
        options.validate()
        stages = estimate(options, command.arch, command.zero, command.about)
    except UserError:
        return None
    total = worst_stage(stages).total() / GIB
    return Try(
        gives_up,
        tuple(_flags(command.options, options)),
        layout_name(options.parallel, command.about.gpus),
        options.data.seq_length,
        total,
        worst_stage(stages, worst=True).total(True) / GIB,
        total <= command.about.gpu_memory,
    )


def _flags(asked: Options, options: Options) -> Iterator[str]:
    """What has changed."""
    for group in ("model", "data", "distill", "optimizer", "generate", "parallel"):
        old, new = vars(getattr(asked, group)), vars(getattr(options, group))
        for name, value in new.items():
            flag = "--" + name.replace("_", "-")
            if value is True and not old[name]:
                yield flag
            elif value is not None and value != old[name]:
                yield f"{flag} {value}"


def format_tries(command: Command, tries: list[Try]) -> str:
    """Lines for the terminal."""
    about, model = command.about, command.options.model
    gpus = f"{about.gpus} GPU{'s' * (about.gpus > 1)} of {about.gpu_memory:g} GiB"
    lines = [f"{command.arch.name}, stage {model.stage}, {gpus}", ""]
    rows = [["gives up", "layout", "rows of", "even load", "worst load", ""]]
    for one in tries:
        sizes = (f"{one.total:.1f}", f"{one.total_at_worst_load:.1f}")
        rows.append(
            [one.gives_up, one.layout, f"{one.row:,}", *sizes, "fits" if one.fits else "does not fit"]
        )
    lines += text_table(rows, "llrrrl", "  ")
    if tries and tries[-1].fits:
        lines += ["", "add to the recipe: " + (" ".join(tries[-1].flags) or "nothing")]
    else:
        lines += ["", "nothing fits: more GPUs, larger ones, or a smaller model"]
    lines.append(
        "GiB on the GPU that needs most; estimated as `zeda plan memory` does, which shows the parts"
    )
    return "\n".join(lines)


def markdown_row(tries: list[Try]) -> str:
    """Cells of a table row: what is given up, flags, layout, tokens of a row, GiB evenly and at worst loaded."""
    one = tries[-1]
    flags = f"`{' '.join(one.flags)}`" if one.flags else ""
    cells = [one.gives_up if one.fits else "does not fit", flags, one.layout, f"{one.row:,}"]
    return " | ".join([*cells, f"{one.total:.1f}", f"{one.total_at_worst_load:.1f}"])


def main(argv: list[str]) -> int:
    """Entry point. Exit code 1 if nothing fits."""
    command = read_command(argv, "zeda plan fit")
    tries = first_fit(command)
    if command.form == "json":
        print(json.dumps([vars(one) for one in tries], indent=1))
    elif command.form == "markdown" and tries:
        print(markdown_row(tries))
    else:
        print(format_tries(command, tries))
    return 0 if tries and tries[-1].fits else 1
