"""Tensors that change hands between data- and context-parallel ranks, each sent only to the ranks that need it."""

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
        home: per number the rank that has it, among data- and context-parallel ranks.
        place: per number the data-parallel rank that needs it; all of its context-parallel ranks get it.
        shapes: per number its shape. dtype: of all.

    Returns:
        number -> tensor on the CPU, of those that this rank needs.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    rank, ranks = group.rank(), group.size()
    size = parallel_state.get_context_parallel_world_size()  # they count fastest
    numbers = range(len(home))
    if ranks == 1:
        return {i: mine[i] for i in numbers}
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape in shapes]
    sent = [[i for i in numbers if (home[i], place[i]) == (rank, other // size)] for other in range(ranks)]
    received = [
        [i for i in numbers if (home[i], place[i]) == (other, rank // size)] for other in range(ranks)
    ]
    # As bytes: not every backend knows small integers.
    parts = [mine[i].contiguous().view(torch.uint8).flatten() for some in sent for i in some]
    source = torch.cat([torch.empty(0, dtype=torch.uint8), *parts]).to(device())
    lengths, wanted = ([sum(sizes[i] for i in some) for some in groups] for groups in (sent, received))
    target = torch.empty(sum(wanted), dtype=torch.uint8, device=source.device)
    torch.distributed.all_to_all_single(target, source, wanted, lengths, group=group)
    order = [i for some in received for i in some]
    pieces = target.cpu().split([sizes[i] for i in order])
    return {i: piece.clone().view(dtype).view(shapes[i]) for i, piece in zip(order, pieces, strict=True)}
