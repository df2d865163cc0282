"""The cache behind one clock: what each row sees, and that moving columns loses nothing."""

import torch

from zeda_megatron.distill.kv_slots import KVSlots, SlotContext


def prefill(values: list[list[int]]) -> SlotContext:
    """A context as the model leaves it: left-padded rows, here one number per token, and the last one as state."""
    longest = max(map(len, values))
    context = SlotContext(len(values), longest)
    rows = [[-1] * (longest - len(v)) + v for v in values]
    columns = torch.tensor(rows, dtype=torch.float32).t()[:, :, None, None]
    context.key_value_memory_dict = {1: (columns, columns + 0.5)}
    context.recurrent_states = {2: (columns[-1, :, 0],)}
    return context


def seen(cache: KVSlots, row: int) -> list[float]:
    keys, values = cache.context.key_value_memory_dict[1]
    part = slice(int(cache.starts_B[row]), cache.clock)
    assert torch.equal(values[part, row], keys[part, row] + 0.5)
    return keys[part, row, 0, 0].tolist()


def write(cache: KVSlots, numbers: list[int], free=()) -> torch.Tensor | None:
    hidden = cache.next_column(list(free))
    for offset, part in zip((0.0, 0.5), cache.context.key_value_memory_dict[1], strict=True):
        part[cache.context.sequence_len_offset, :, 0, 0] = torch.tensor(numbers) + offset
    return hidden


def test_a_row_sees_its_own_tokens_alone_and_in_order():
    cache = KVSlots(slots=3, length=6)
    cache.admit([0, 1], prefill([[1, 2, 3], [11]]), [3, 1])
    hidden = write(cache, [4, 12, 99], free=[2])
    assert seen(cache, 0) == [1, 2, 3, 4] and seen(cache, 1) == [11, 12]
    assert (~hidden[:, 0, 0]).sum(1).tolist() == [4, 2, 1]
    # Row 0 ends; a longer prompt takes its place: everything moves to make room.
    cache.admit([0, 2], prefill([[21, 22, 23, 24, 25], [31, 32]]), [5, 2])
    assert (
        seen(cache, 0) == [21, 22, 23, 24, 25] and seen(cache, 1) == [11, 12] and seen(cache, 2) == [31, 32]
    )
    write(cache, [26, 13, 33])
    write(cache, [97, 14, 34], free=[0])
    for tick in range(15, 18):  # the end of the cache: columns that nobody sees any more are given up
        write(cache, [0, tick, tick + 20], free=[0])
        assert seen(cache, 1) == list(range(11, tick + 1)), tick
        assert seen(cache, 2) == [31, 32, 33, 34, *range(35, tick + 21)]
        if cache.clock == 6:
            break


def test_rows_can_be_dropped():
    cache = KVSlots(slots=3, length=8)
    cache.admit([0, 1, 2], prefill([[1], [2, 3], [4, 5, 6]]), [1, 2, 3])
    cache.keep([2, 0])
    assert seen(cache, 0) == [4, 5, 6] and seen(cache, 1) == [1]
    write(cache, [7, 8])
    assert seen(cache, 0) == [4, 5, 6, 7] and seen(cache, 1) == [1, 8]


def test_equal_beginnings_need_no_mask():
    cache = KVSlots(slots=2, length=8)
    cache.admit([0, 1], prefill([[1, 2], [3, 4]]), [2, 2])
    assert cache.next_column([]) is None


def test_moving_columns_leaves_positions_as_they_are():
    """What latent attention needs: a cached key was rotated for its position, which is its column plus the drift."""
    cache = KVSlots(slots=2, length=6)
    context = cache.prefill_context([0], 3)
    assert context.drift == 0
    cache.admit([0], prefill([[0, 1, 2]]), [3])  # numbers are the positions
    write(cache, [3, 0], free=[1])
    context = cache.prefill_context([1], 5)
    assert context.drift == -1  # five tokens that end with position 3
    cache.admit([1], prefill([[-1, 0, 1, 2, 3]]), [5])
    for position in range(4, 30):
        write(cache, [position, position], free=[0])
        assert cache.context.sequence_len_offset + cache.context.drift == position
        here = range(int(cache.starts_B[1]), cache.clock)
        assert seen(cache, 1) == [column + cache.context.drift for column in here]
        if cache.clock == cache.length:
            cache.starts_B[1] += 2  # the oldest are forgotten
    cache.prefill_context([0, 1], 2)
    assert cache.clock + cache.context.drift == 2  # nobody remembers: positions begin anew


def states(cache: KVSlots) -> list[float]:
    return cache.context.recurrent_states[2][0].flatten().tolist()


def test_a_prompt_brings_its_recurrent_state_and_the_others_keep_theirs():
    cache = KVSlots(slots=3, length=6)
    cache.admit([0, 2], prefill([[1, 2, 3], [11]]), [3, 1])
    assert states(cache) == [3, 0, 11]
    cache.context.recurrent_states[2][0][2] = 12.0  # as a pass writes it
    cache.admit([0, 1], prefill([[21, 22], [31]]), [2, 1])
    assert states(cache) == [22, 31, 12]
    cache.keep([2, 0])
    assert states(cache) == [12, 22]
