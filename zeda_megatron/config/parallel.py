"""How many ranks do what, and how long they wait for one another.

Which layers lie on which pipeline stage is told as Megatron's own layer counts and offsets have it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the parallel dimensions; names are Megatron's."""

    tensor_model_parallel_size: int = 1
    """Tensor parallelism (attention, dense parts, vocabulary)."""

    pipeline_model_parallel_size: int = 1
    """Pipeline stages."""

    virtual_pipeline_model_parallel_size: int = 1
    """Groups of layers per pipeline rank (interleaved schedule)."""

    decoder_first_pipeline_num_layers: int | None = None
    """Layers of the first pipeline stage. None: as many as the other stages."""

    decoder_last_pipeline_num_layers: int | None = None
    """Layers of the last pipeline stage. None: as many as the other stages."""

    context_parallel_size: int = 1
    """Context parallelism (sequence split inside attention)."""

    expert_model_parallel_size: int = 1
    """Expert parallelism: the real experts of a layer are spread over this many ranks."""

    expert_tensor_parallel_size: int = 1
    """Tensor parallelism inside one expert."""

    distributed_timeout_minutes: float = 10.0
    """A collective that takes longer than this ends the run."""

    def validate(self) -> None:
        """Raise `UserError` for a size below 1 or a timeout that is none."""
        minutes = self.distributed_timeout_minutes
        if not 0 < minutes <= 60 * 24 * 366:
            raise UserError(f"--distributed-timeout-minutes {minutes:g} must be above 0, and at most a year")
        for name, size in vars(self).items():
            if name.endswith("_size") and size < 1:
                raise UserError(f"--{name.replace('_', '-')} {size} must be at least 1")

    @property
    def virtual_stages(self) -> int | None:
        """Virtual stages per rank as Megatron wants them: None where the schedule is not interleaved."""
        size = self.virtual_pipeline_model_parallel_size
        return size if size > 1 else None

    @property
    def row_multiple(self) -> int:
        """What the rows of a data-parallel rank must be a multiple of: the interleaved schedule takes as many at a time
        as there are stages."""
        return self.pipeline_model_parallel_size if self.virtual_stages else 1

    @property
    def model_parallel_size(self) -> int:
        return (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )


STAGES = "--pipeline-model-parallel-size"
VIRTUAL = "--virtual-pipeline-model-parallel-size"


def stage_sizes(num_layers: int, parallel: ParallelConfig) -> tuple[int, ...]:
    """Layers of every pipeline stage; the stages between a first and a last one of their own share the rest evenly.

    Raises `UserError` for a split that leaves a stage without layers or does not divide.
    """
    stages = parallel.pipeline_model_parallel_size
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    given = {
        "--decoder-first-pipeline-num-layers": first,
        "--decoder-last-pipeline-num-layers": last,
    }
    given = {flag: size for flag, size in given.items() if size is not None}
    words = " and ".join(f"{flag} {size}" for flag, size in given.items())
    left, rest = stages - len(given), num_layers - sum(given.values())
    if stages == 1 and given:
        raise UserError(f"{words}: needs {STAGES} above 1")
    if min(given.values(), default=1) < 1:
        raise UserError(f"{words}: must be at least 1")
    if not given and rest % stages:
        raise UserError(
            f"{STAGES} {stages} does not divide the model's {num_layers} layers; give "
            "--decoder-first-pipeline-num-layers or --decoder-last-pipeline-num-layers for a stage of another size"
        )
    if rest < left or (left and rest % left) or (not left and rest):
        raise UserError(
            f"{words}: of the model's {num_layers} layers {rest} are left for {left} other stages ({STAGES} {stages})"
            + ("; their number does not divide it" if 0 < left <= rest else "")
        )
    sizes = [rest // left if left else 0] * stages
    if first is not None:
        sizes[0] = first
    if last is not None:
        sizes[-1] = last
    virtual = parallel.virtual_pipeline_model_parallel_size
    if virtual > 1 and not left:  # Megatron's offsets then divide by the number of other stages
        raise UserError(f"{VIRTUAL} {virtual}: give only one of {words}")
    for size in sizes:
        if size % virtual:
            if not given:
                raise UserError(
                    f"{STAGES} x {VIRTUAL} {stages * virtual} does not divide the model's {num_layers} layers"
                )
            raise UserError(
                f"{VIRTUAL} {virtual} does not divide the layers of every stage, {' + '.join(map(str, sizes))} "
                f"({words})"
            )
    return tuple(sizes)


def stage_layers(num_layers: int, parallel: ParallelConfig) -> tuple[tuple[int, ...], ...]:
    """Layers (counted from 0) of every pipeline stage, all its virtual stages together."""
    sizes = stage_sizes(num_layers, parallel)
    virtual, layers, following = parallel.virtual_pipeline_model_parallel_size, [[] for _ in sizes], 0
    for _ in range(virtual):
        for mine, size in zip(layers, sizes):
            mine += range(following, following + size // virtual)
            following += size // virtual
    return tuple(map(tuple, layers))
