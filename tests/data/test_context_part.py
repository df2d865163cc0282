"""Parts of a packed row for context-parallel ranks."""

import pytest
import torch

from zeda_megatron.data.context_part import context_part, local_places
from zeda_megatron.data.packing import PackedDataset, TokenSample


def row(length=64, align=8):
    samples = [TokenSample(list(range(1, n + 1)), [i >= n // 2 for i in range(n)]) for n in (13, 24, 7)]
    return PackedDataset(samples, length, pad_id=0, seed=0, align=align)[0]


@pytest.mark.parametrize("size", [2, 4])
def test_the_ranks_parts_are_the_row_each_token_once_and_equally_many(size):
    batch = row()
    parts = [context_part(batch, rank, size) for rank in range(size)]
    places = torch.cat([local_places(batch.cu_seqlens, rank, size) for rank in range(size)])
    assert sorted(places.tolist()) == list(range(64))
    for name in ("tokens", "labels", "loss_mask", "position_ids", "padding_mask"):
        values = torch.cat([getattr(part, name) for part in parts], dim=1)
        assert all(getattr(part, name).shape == (1, 64 // size) for part in parts)
        assert torch.equal(values, getattr(batch, name)[:, places]), name
    assert all(torch.equal(part.cu_seqlens, batch.cu_seqlens) for part in parts)


def test_every_rank_has_an_early_and_a_late_chunk_of_every_sequence():
    """As Megatron's own split of an unpacked sequence: chunks r and 2 * size - 1 - r."""
    places = local_places(torch.tensor([0, 16, 24], dtype=torch.int32), rank=1, size=2)
    assert places.tolist() == [4, 5, 6, 7, 8, 9, 10, 11, 18, 19, 20, 21]


def test_one_rank_gets_the_row_itself_and_uneven_sequences_are_refused():
    batch = row(align=1)
    assert context_part(batch, 0, 1) is batch
    with pytest.raises(ValueError, match="equal chunks"):
        context_part(batch, 0, 2)
