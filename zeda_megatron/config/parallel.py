"""How many ranks do what, and how long they wait for one another."""

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
