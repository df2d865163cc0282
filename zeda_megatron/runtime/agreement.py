"""What the processes of a run tell one another so that they decide alike; a process alone talks to itself."""

from __future__ import annotations

from typing import TypeVar

import torch

T = TypeVar("T")


def rank() -> int:
    """Number of this process."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        torch.distributed.barrier()


def gathered(value: T) -> list[T]:
    """The values of all processes, by rank."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def from_rank0(value: T) -> T:
    """Rank 0's value."""
    if world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
