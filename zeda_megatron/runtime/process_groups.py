"""Start-up of torch.distributed and of Megatron's process groups: NCCL with CUDA, gloo without."""

from __future__ import annotations

import logging
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from ..config.parallel import ParallelConfig
from ..errors import UserError
from . import cpu


def initialize(parallel: ParallelConfig | None = None, seed: int = 1234) -> None:
    """Start the default group (from torchrun's or Slurm's variables, or alone) and Megatron's groups.

    Raises `UserError` for a size below 1 and if the sizes do not divide the number of processes.
    """
    cpu.install()
    from megatron.core import parallel_state, rerun_state_machine, tensor_parallel

    parallel = parallel or ParallelConfig()
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


@contextmanager
def started(parallel: ParallelConfig | None = None, seed: int = 1234) -> Iterator[None]:
    """`with started(parallel): ...`: the groups of `initialize`, ended whatever happens inside."""
    initialize(parallel, seed)
    try:
        yield
    finally:
        destroy()


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
