"""Hidden units for heads: rows that are kept, and the descent on them."""

import pytest
import torch
from torch.nn import functional as F

from zeda_megatron.fit.hidden_units import RowStore, fit_hidden_units
from zeda_megatron.fit.ridge import RidgeSums

EXPERTS, SIZE = 3, 12


def rows(count=6000, seed=0):
    """A target that no linear head predicts: each expert's own weight on units that all share; inputs far from 0."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, SIZE, generator=draw)
    expert = torch.randint(0, EXPERTS, (count,), generator=draw).sort().values
    truth = torch.Generator().manual_seed(9)
    unit = F.silu(3 * x @ torch.randn(SIZE, 2, generator=truth))
    y = (unit * torch.randn(EXPERTS, 2, generator=truth)[expert]).sum(1) + 0.05 * torch.randn(
        count, generator=draw
    )
    return 7 + 0.1 * x, y, expert


def predicted(head, x, expert):
    value = (x * head["weight"][expert]).sum(1) + head["bias"][expert]
    unit = F.silu(F.linear(x, head["hidden_weight"], head["hidden_bias"]))
    return value + (unit * head["hidden_output"][expert]).sum(1)


def fitted(given):
    sums = RidgeSums(EXPERTS, SIZE, torch.device("cpu"))
    sums.add(*given)
    linear = sums.solve(0.01)
    return linear, fit_hidden_units(given, *linear, 8, None)


def test_hidden_units_predict_new_rows_that_a_linear_head_cannot_and_the_same_rows_give_the_same_bits():
    given, (x, y, expert) = rows(), rows(seed=1)
    (weight, bias), head = fitted(given)
    left = (y - (x * weight[expert]).sum(1) - bias[expert]).square().mean() / y.var()
    now = (y - predicted(head, x, expert)).square().mean() / y.var()
    assert left > 0.2 and now < 0.2 * left
    again = fitted(given)[1]
    assert all(torch.equal(again[name], head[name]) for name in head)


@pytest.mark.parametrize("piece", [50, 999])
def test_a_store_keeps_rows_of_the_whole_stream_within_its_bounds(piece):
    store, (x, _, expert) = RowStore(most=500), rows(6000)
    for first in range(0, 6000, piece):
        store.add(*(part[first : first + piece] for part in (x, torch.arange(6000.0), expert)))
    kept_x, kept, kept_expert = store.rows()
    assert 250 <= len(kept) <= 500
    place = kept.long()
    assert (
        torch.equal(kept_x, x[place])
        and torch.equal(kept_expert, expert[place])
        and len(place.unique()) == len(place)
    )
    for quarter in torch.histc(kept, 4, 0, 6000).tolist():
        assert len(kept) / 8 < quarter < len(kept) / 2


def test_a_stream_that_fits_is_kept_whole():
    store, given = RowStore(most=500), rows(300)
    store.add(*given)
    assert all(torch.equal(kept, part) for kept, part in zip(store.rows(), given))
