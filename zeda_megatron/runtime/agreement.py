"""What the processes of a run tell one another so that they decide alike; a process alone talks to itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from ..errors import UserError

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


def on_rank0(do: Callable[[], T]) -> T:
    """Do something on rank 0 alone. All processes call it, and get its result or raise what it raised: whoever went on
    would wait for rank 0 for ever."""
    result = failure = None
    if rank() == 0:
        try:
            result = do()
        except Exception as error:  # whatever it is, nobody may be left waiting
            failure = error
            if world_size() > 1 and not isinstance(error, UserError | OSError):
                from_rank0((None, RuntimeError(f"rank 0: {type(error).__name__}: {error}")))
                raise
    result, failure = from_rank0((result, failure))
    if failure is not None:
        raise failure
    return result
