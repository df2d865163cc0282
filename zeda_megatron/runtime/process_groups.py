"""Start-up of torch.distributed and of Megatron's process groups: NCCL with CUDA, gloo without."""

from __future__ import annotations

import logging
import os
import resource
import time
from dataclasses import dataclass
from datetime import timedelta

import torch

from ..errors import UserError
from . import cpu


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


def initialize(parallel: ParallelConfig, seed: int = 1234) -> None:
    """Start the default group (from torchrun's or Slurm's variables, or alone) and Megatron's groups.

    Raises `UserError` for a size below 1 and if the sizes do not divide the number of processes.
    """
    cpu.install()
    from megatron.core import parallel_state, rerun_state_machine, tensor_parallel

    parallel.validate()
    minutes = parallel.distributed_timeout_minutes
    rank, world, local = _place()
    expert_size = (
        parallel.expert_model_parallel_size
        * parallel.expert_tensor_parallel_size
        * parallel.pipeline_model_parallel_size
    )
    for name, size in (
        ("tensor x pipeline x context parallel size", parallel.model_parallel_size),
        ("expert x expert-tensor x pipeline parallel size", expert_size),
    ):
        if world % size:
            raise UserError(f"{name} = {size} does not divide the number of processes, {world}")
    if not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(local % torch.cuda.device_count())
        # A process alone meets no one: no port, which another program could take first.
        store = torch.distributed.HashStore() if world == 1 else None
        torch.distributed.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            rank=rank,
            world_size=world,
            store=store,
            timeout=timedelta(minutes=minutes),
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_stages,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=minutes,
        )
        _disable_reruns(rerun_state_machine)
    # Seeds differ between pipeline stages and, inside Megatron's tracker, between tensor and expert ranks.
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)


def destroy() -> None:
    """End Megatron's groups and the default group."""
    from megatron.core import parallel_state, rerun_state_machine

    rerun_state_machine.destroy_rerun_state_machine()
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def device() -> torch.device:
    """The device of this process."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def peak_memory_gib() -> float:
    """Most memory that this process has held at a time, GiB: tensors on its GPU, else all of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def seconds_now() -> float:
    """The clock, once the device has done what it was asked to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _disable_reruns(module) -> None:
    # Megatron would do the same later, with warnings that mean nothing to a user.
    logger = logging.getLogger(module.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    module.destroy_rerun_state_machine()
    module.initialize_rerun_state_machine(mode=module.RerunMode.DISABLED)
    logger.setLevel(level)


def _place() -> tuple[int, int, int]:
    env = os.environ
    if "RANK" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    return 0, 1, 0
