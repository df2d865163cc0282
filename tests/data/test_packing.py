"""Packed rows: bounds, labels, masks, order; the loss against transformers run on each sample alone."""

import random
from collections import Counter
from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from zeda_megatron.data.packing import (
    EpochOrder,
    PackedDataset,
    TokenSample,
    context_part,
    local_places,
    pack_first_fit,
)
from zeda_megatron.errors import UserError

PAD = 0


def make_samples(count, longest, seed=0, vocab=50):
    rng = random.Random(seed)
    samples = []
    for i in range(count):
        n = rng.randint(2, longest)
        cut = rng.randint(1, n - 1)
        tokens = [rng.randrange(1, vocab) for _ in range(n)]
        samples.append(TokenSample(tokens, [j >= cut for j in range(n)], kind=f"k{i % 3}"))
    return samples


def same(a, b):
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(vars(a).values(), vars(b).values())
    )


@pytest.mark.parametrize("align", [1, 4])
def test_every_field_is_what_a_plain_loop_gives(align):
    samples, S = make_samples(40, 20), 32
    dataset = PackedDataset(samples, S, PAD, seed=1, align=align)
    for row in range(dataset.rows_in_epoch(0)):
        tokens, labels, mask, positions, padding, bounds, kinds = [], [], [], [], [], [0], []
        for i in dataset.row_samples(row):
            s = samples[i]
            n = len(s.tokens)
            room = -(-n // align) * align
            for j in range(room):
                tokens.append(s.tokens[j] if j < n else PAD)
                labels.append(s.tokens[j + 1] if j + 1 < n else PAD)
                mask.append(float(j + 1 < n and s.is_response[j + 1]))
                positions.append(j)
                padding.append(j >= n)
            bounds.append(bounds[-1] + room)
            kinds.append(s.kind)
        if (tail := S - len(tokens)) > 0:
            tokens += [PAD] * tail
            labels += [PAD] * tail
            mask += [0.0] * tail
            positions += range(tail)
            padding += [True] * tail
            bounds.append(S)
            kinds.append("")
        batch = dataset[row]
        assert batch.tokens.tolist() == [tokens]
        assert batch.labels.tolist() == [labels]
        assert batch.loss_mask.tolist() == [mask]
        assert batch.position_ids.tolist() == [positions]
        assert batch.padding_mask.tolist() == [padding]
        assert batch.cu_seqlens.tolist() == bounds
        assert batch.max_seqlen == max(b - a for a, b in pairwise(bounds))
        assert batch.kinds == tuple(kinds)
        assert all(b % align == 0 for b in bounds)


def test_dtypes_and_shapes_are_those_promised():
    batch = PackedDataset(make_samples(5, 8), 16, PAD, seed=0)[0]
    for name, dtype in {
        "tokens": torch.int64,
        "labels": torch.int64,
        "loss_mask": torch.float32,
        "position_ids": torch.int64,
        "padding_mask": torch.bool,
    }.items():
        assert getattr(batch, name).dtype == dtype
        assert getattr(batch, name).shape == (1, 16)
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.to("meta").tokens.device.type == "meta"
    assert batch.to("meta").max_seqlen == batch.max_seqlen


def test_packed_loss_equals_each_sample_alone_in_transformers():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    samples = make_samples(12, 14)
    dataset = PackedDataset(samples, 32, PAD, seed=3)
    for row in range(dataset.rows_in_epoch(0)):
        batch = dataset[row]
        ids = torch.bucketize(torch.arange(32), batch.cu_seqlens[1:], right=True)
        allowed = (ids[:, None] == ids[None]) & torch.ones(32, 32).tril().bool()
        with torch.no_grad():
            logits = model(
                batch.tokens, attention_mask=allowed[None, None], position_ids=batch.position_ids
            ).logits
            packed = torch.nn.functional.cross_entropy(logits[0], batch.labels[0], reduction="none")
            alone = 0.0
            for i in dataset.row_samples(row):
                tokens = torch.tensor([samples[i].tokens])
                targets = tokens.masked_fill(~torch.tensor([samples[i].is_response]), -100)
                count = (targets[:, 1:] != -100).sum()
                alone += model(tokens, labels=targets).loss * count
        assert torch.allclose((packed * batch.loss_mask[0]).sum(), alone, rtol=1e-5)


def test_every_sample_occurs_exactly_once_per_epoch_and_epochs_differ():
    samples = make_samples(200, 30)
    dataset = PackedDataset(samples, 64, PAD, seed=7)
    first, orders = 0, []
    for epoch in range(3):
        rows = range(first, first + dataset.rows_in_epoch(epoch))
        orders.append([i for row in rows for i in dataset.row_samples(row)])
        assert sorted(orders[-1]) == list(range(200))
        wanted = Counter(tuple(s.tokens) for s in samples)
        for row in rows:
            batch = dataset[row]
            for a, b in pairwise(batch.cu_seqlens.tolist()):
                if not batch.padding_mask[0, a]:
                    wanted[tuple(batch.tokens[0, a:b].tolist())] -= 1
        assert not any(wanted.values())
        first += dataset.rows_in_epoch(epoch)
    assert orders[0] != orders[1] != orders[2]


def test_resuming_by_row_number_equals_the_uninterrupted_run():
    samples = make_samples(50, 20)
    straight = PackedDataset(samples, 40, PAD, seed=5)
    end = sum(straight.rows_in_epoch(e) for e in range(3))
    rows = [straight[r] for r in range(end)]
    for start in (1, end // 2, end - 1):
        resumed = PackedDataset(samples, 40, PAD, seed=5)
        assert all(same(resumed[r], rows[r]) for r in range(start, end))
    # Any order of access, too: the plan of an epoch that left the cache is made again.
    assert all(same(straight[r], rows[r]) for r in (end - 1, 0, end // 2, 1))


def test_ranks_share_the_rows_whatever_their_number():
    samples = make_samples(30, 20)
    total = 12
    alone = [PackedDataset(samples, 40, PAD, seed=2)[r] for r in range(total)]
    for ranks in (2, 3, 4):
        views = [PackedDataset(samples, 40, PAD, seed=2) for _ in range(ranks)]
        for r in range(total):
            assert same(views[r % ranks][r], alone[r])


def test_the_seed_changes_the_order():
    samples = make_samples(50, 20)
    a, b = (PackedDataset(samples, 40, PAD, seed=s) for s in (1, 2))
    assert [a.row_samples(r) for r in range(5)] != [b.row_samples(r) for r in range(5)]


def test_first_fit_uses_the_first_row_with_room_and_fills_rows_well():
    assert pack_first_fit([6, 5, 4, 3, 2], [0, 1, 2, 3, 4], 10) == [[0, 2], [1, 3, 4]]
    rng = random.Random(0)
    lengths = [rng.randint(1, 100) for _ in range(3000)]
    rows = pack_first_fit(lengths, list(range(3000)), 256)
    assert all(sum(lengths[i] for i in row) <= 256 for row in rows)
    assert len(rows) <= 1.03 * sum(lengths) / 256


def test_a_sample_may_fill_a_whole_row():
    batch = PackedDataset([TokenSample([1, 2, 3, 4], [False, True, True, True])], 4, PAD, seed=0)[0]
    assert batch.cu_seqlens.tolist() == [0, 4]
    assert not batch.padding_mask.any()


def test_unusable_input_is_refused():
    with pytest.raises(UserError, match="no samples"):
        PackedDataset([], 8, PAD, seed=0)
    with pytest.raises(UserError, match=r"sample 1 has 9 tokens; a row holds 1 to 8"):
        PackedDataset([TokenSample([1] * 9, [True] * 9)], 8, PAD, seed=0)
    with pytest.raises(UserError, match="multiple of 3"):
        PackedDataset(make_samples(2, 4), 8, PAD, seed=0, align=3)
    with pytest.raises(IndexError):
        PackedDataset(make_samples(2, 4), 8, PAD, seed=0)[-1]


def test_epoch_order_is_a_new_permutation_each_epoch_reached_at_random():
    order = EpochOrder(9, seed=4)
    epochs = [[order[e * 9 + i] for i in range(9)] for e in range(4)]
    assert all(sorted(e) == list(range(9)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4
    assert EpochOrder(9, seed=4)[20] == epochs[2][2]
    assert order.epoch(1) == epochs[1]


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
