"""The expert MLP with biases, clamps and offsets: both products against a dense definition, gradients included."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from zeda_megatron.models.families.gpt_oss import gate
from zeda_megatron.ops.grouped_mlp import SWIGLU, GatedUnit, grouped_mlp, lay_side_by_side, stacked

H, HIDDEN, COUNTS = 16, 8, [5, 0, 7, 1]
UNITS = {"swiglu": SWIGLU, "gpt-oss": GatedUnit(partial(gate, 1.702), 1.0, 1.0)}


def drawn(*shape, seed):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.requires_grad_()


def definition(kind, row, prob, w1, w2, b1, b2):
    """One row of one expert."""
    left, right = (w1 @ row + b1).split(HIDDEN)
    if kind == "gpt-oss":
        left, right = torch.minimum(left, torch.tensor(1.0)), right.clamp(-1.0, 1.0)
        inner = left * torch.sigmoid(1.702 * left) * (right + 1.0)
    else:
        inner = F.silu(left) * right
    return prob * (w2 @ inner + b2)


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("kind", UNITS)
def test_values_and_gradients_are_those_of_the_definition(kind, biased, backend):
    rows, probs = drawn(sum(COUNTS), H, seed=0), torch.rand(sum(COUNTS)).requires_grad_()
    experts = [
        [drawn(2 * HIDDEN, H, seed=4 * e + 1), drawn(H, HIDDEN, seed=4 * e + 2)] for e in range(len(COUNTS))
    ]
    biases = [[drawn(2 * HIDDEN, seed=4 * e + 3), drawn(H, seed=4 * e + 4)] for e in range(len(COUNTS))]
    none = [[torch.zeros(2 * HIDDEN), torch.zeros(H)]] * len(COUNTS)
    first, second = zip(*experts)
    given = tuple(map(list, zip(*biases))) if biased else None
    made = grouped_mlp(rows, probs, COUNTS, list(first), list(second), backend, UNITS[kind], given)
    owner = [e for e, count in enumerate(COUNTS) for _ in range(count)]
    wanted = torch.stack(
        [
            definition(kind, row, prob, *experts[e], *(biases if biased else none)[e])
            for row, prob, e in zip(rows, probs, owner)
        ]
    )
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)
    inputs = [rows, probs, *(w for pair in experts for w in pair)]
    inputs += [b for pair in biases for b in pair] if biased else []
    weight = drawn(*made.shape, seed=99).detach()
    mine, theirs = (
        torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True) for out in (made, wanted)
    )
    for a, b, x in zip(mine, theirs, inputs):
        a, b = (torch.zeros_like(x) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_weights_that_lie_side_by_side_are_multiplied_where_they_lie_with_the_same_bits():
    rows, probs = drawn(sum(COUNTS), H, seed=0), torch.rand(sum(COUNTS)).requires_grad_()
    first = [drawn(2 * HIDDEN, H, seed=e) for e in range(len(COUNTS))]
    second = [drawn(H, HIDDEN, seed=9 + e) for e in range(len(COUNTS))]
    found = []
    for _ in range(2):
        out = grouped_mlp(rows, probs, COUNTS, first, second, "grouped_mm")
        found.append([out, *torch.autograd.grad(out.square().sum(), [rows, probs, *first, *second])])
        lay_side_by_side(first)
        lay_side_by_side(second)
    for apart, beside in zip(*found):
        assert torch.equal(apart, beside)
    for weights in (first, second):
        assert stacked(weights).data_ptr() == weights[0].data_ptr() and weights[0].requires_grad
        assert torch.equal(stacked(weights), torch.stack(weights))


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [0, 2, 1]])
def test_weights_in_somebodys_buffer_stay_there(order):
    buffer = torch.randn(4 * 6)
    weights = [torch.nn.Parameter(buffer[6 * place : 6 * place + 6].view(2, 3)) for place in order]
    before = [weight.data_ptr() for weight in weights]
    lay_side_by_side(weights)
    assert [weight.data_ptr() for weight in weights] == before
    assert torch.equal(stacked(weights), torch.stack(weights))
    assert (stacked(weights).data_ptr() == before[0]) == (order == [0, 1, 2])
