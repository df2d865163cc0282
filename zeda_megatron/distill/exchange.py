"""Tensors that change hands between data-parallel ranks, each sent only to the rank that needs it."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from ..runtime.process_groups import device


def exchange(
    mine: dict[int, torch.Tensor],
    home: list[int],
    place: list[int],
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
) -> dict[int, torch.Tensor]:
    """Send numbered tensors from the ranks that have them to the ranks that need them; all ranks call it.

    Args:
        mine: number -> tensor, of those that this rank has.
        home, place: per number the data-parallel rank that has it, and the one that needs it.
        shapes: per number its shape. dtype: of all.

    Returns:
        number -> tensor on the CPU, of those that this rank needs.
    """
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    numbers = range(len(home))
    if ranks == 1:
        return {i: mine[i] for i in numbers}
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape in shapes]
    sent = [[i for i in numbers if (home[i], place[i]) == (rank, other)] for other in range(ranks)]
    received = [[i for i in numbers if (home[i], place[i]) == (other, rank)] for other in range(ranks)]
    # As bytes: not every backend knows small integers.
    parts = [mine[i].contiguous().view(torch.uint8).flatten() for group in sent for i in group]
    source = torch.cat([torch.empty(0, dtype=torch.uint8), *parts]).to(device())
    lengths, wanted = ([sum(sizes[i] for i in group) for group in groups] for groups in (sent, received))
    target = torch.empty(sum(wanted), dtype=torch.uint8, device=source.device)
    group = parallel_state.get_data_parallel_group()
    torch.distributed.all_to_all_single(target, source, wanted, lengths, group=group)
    order = [i for group in received for i in group]
    pieces = target.cpu().split([sizes[i] for i in order])
    return {i: piece.clone().view(dtype).view(shapes[i]) for i, piece in zip(order, pieces, strict=True)}
