"""What to change when a recipe does not fit: each change is tried, its own total stands beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..config.options import Options
from ..config.zero_experts import ZeroExpertConfig
from ..errors import UserError
from ..models.architecture import Architecture
from ..models.build import check_layout
from .memory import GIB, Assumptions, StageMemory, estimate


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
        if distill.teacher_memory == "own":
            changed = replace(distill, teacher_memory="offload")
            yield "--teacher-memory offload", replace(options, distill=changed), about.gpus
        if distill.teacher_schedule == "ahead" and not parallel.virtual_stages:
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
