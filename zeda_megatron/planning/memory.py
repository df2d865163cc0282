"""GPU memory of a training recipe: what stands all the time, and what each phase of a step adds to it.

Weights, gradients, optimizer states and the teacher are counted exactly; activations, buffers of the dispatch, the
loss's working set and the key/value cache are estimates from shapes. Two loads of the experts: rows spread evenly, and
the worst case, in which every pick of the expert-parallel group that can go to one rank goes there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..config.options import Options
from ..config.zero_experts import ZeroExpertConfig
from ..errors import UserError
from ..models.architecture import Architecture
from .memory_parameters import StageParameters, stage_parameters
from .memory_phases import Shapes, answers, student_pass, teacher_pass

GIB = 1 << 30


@dataclass(frozen=True)
class Assumptions:
    """What no option says."""

    gpus: int
    """GPUs of the whole run."""
    gpu_memory: float = 80.0
    """GiB of one."""
    zero_share: float = 0.0
    """Share of picks that go to zero experts; 0 is safe, and what the teacher has."""
    prompt_tokens: int = 1024
    """Longest prompt, while answers are generated."""
    context_gib: float = 1.5
    """CUDA context, NCCL's buffers, libraries' workspaces."""
    fragmentation: float = 0.05
    """What the allocator loses, as a share of all the rest."""


@dataclass(frozen=True)
class Load:
    """Bytes with experts evenly loaded, and at their worst."""

    average: float
    """Even load."""
    worst: float
    """Worst case."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one GPU of a pipeline stage."""

    stage: int
    """Which one, from 0."""
    standing: dict[str, float]
    """Part -> bytes that are there all the time."""
    phases: dict[str, dict[str, Load]] = field(default_factory=dict)
    """Phase of a step -> part -> bytes it adds. Phases follow one another."""
    assumptions: Assumptions | None = None
    """What the reserve is taken from."""

    def peak_phase(self, worst: bool = False) -> str:
        """The phase that adds most."""
        return max(self.phases, key=lambda name: self._sum(name, worst))

    def total(self, worst: bool = False) -> float:
        """Bytes at the peak, reserve included."""
        return self.needed(worst) + self.reserve(worst)

    def needed(self, worst: bool = False) -> float:
        """Bytes at the peak without the reserve."""
        return sum(self.standing.values()) + self._sum(self.peak_phase(worst), worst)

    def reserve(self, worst: bool = False) -> float:
        """Bytes set aside for context and fragmentation."""
        return self.assumptions.context_gib * GIB + self.assumptions.fragmentation * self.needed(worst)

    def _sum(self, phase: str, worst: bool) -> float:
        return sum(load.worst if worst else load.average for load in self.phases[phase].values())


def estimate(
    options: Options, arch: Architecture, zero: ZeroExpertConfig, about: Assumptions
) -> list[StageMemory]:
    """All pipeline stages. Raises `UserError` for a layout that does not fit the GPUs."""
    parallel = options.parallel
    replicas = data_ranks(options, about.gpus)
    rows = replicas * parallel.context_parallel_size  # ranks that share a dense gradient
    ranks = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    copies = about.gpus // (ranks * parallel.pipeline_model_parallel_size)
    found = []
    for stage, count in enumerate(stage_parameters(arch, parallel, zero)):
        standing = standing_bytes(options, count, rows, copies)
        phases = {}
        for worst in (False, True):
            shapes = Shapes.of(options, arch, zero, count, stage, replicas, about.zero_share, worst)
            for name, parts in _phases(options, shapes, about).items():
                phases.setdefault(name, {})[worst] = parts
        loads = {
            name: {part: Load(by[False][part], by[True][part]) for part in by[True]}
            for name, by in phases.items()
        }
        found.append(StageMemory(stage, standing, loads, about))
    return found


def _phases(options: Options, shapes: Shapes, about: Assumptions) -> dict[str, dict[str, float]]:
    stage, made = options.model.stage, {}
    if stage in ("0", "2"):
        made["answers"] = answers(options, shapes, about.prompt_tokens)
    if stage in ("1", "2"):
        made["teacher's pass"] = teacher_pass(options, shapes)
    if stage != "0":
        made["student's pass"] = student_pass(options, shapes)
    return made


def standing_bytes(options: Options, count: StageParameters, rows: int, copies: int) -> dict[str, float]:
    """Weights, gradients, optimizer states and teacher of one GPU.

    Args:
        rows: ranks over which optimizer states of dense parameters are sharded. copies: the same for experts.
    """
    width = 2 if options.model.bf16 else 4
    made = {"weights": float(width * count.total)}
    if options.model.stage == "0":
        return made
    dense, expert = count.trainable(options.model.trainable == "router", options.share.paired_head_lr > 0)
    made["gradients (fp32)"] = 4.0 * (dense + expert)
    # Two moments; under bf16 the fp32 weights too.
    state = 12 if options.model.bf16 else 8
    if options.optimizer.use_distributed_optimizer:
        made["optimizer (sharded)"] = float(state * (math.ceil(dense / rows) + math.ceil(expert / copies)))
    else:
        made["optimizer"] = float(state * (dense + expert))
    if options.model.stage in ("1", "2"):
        mode = options.distill.teacher_memory
        held = {"own": count.total, "offload": 0, "shared": count.router - count.paired}[mode]
        made[f"teacher ({mode})"] = float(width * held)
    return made


def data_ranks(options: Options, gpus: int) -> int:
    """Data-parallel size. Raises `UserError` if the layout does not fit the GPUs or the rows."""
    parallel = options.parallel
    ranks = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    for name, size in (
        ("tensor x pipeline x context parallel size", parallel.model_parallel_size),
        (
            "expert x expert-tensor x pipeline parallel size",
            ranks * parallel.pipeline_model_parallel_size,
        ),
    ):
        if gpus < 1 or gpus % size:
            raise UserError(f"--gpus {gpus}: {name} = {size} does not divide it")
    replicas, batch = gpus // parallel.model_parallel_size, options.optimizer.global_batch_size
    if options.model.stage in ("pretrain", "1") and batch % replicas:
        raise UserError(
            f"--global-batch-size {batch} is not a multiple of the {replicas} data-parallel ranks"
        )
    return replicas
