"""The expert MLP with biases, clamps and offsets: both products against a dense definition, gradients included."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from zeda_megatron.models.families.gpt_oss import gate
from zeda_megatron.ops.grouped_mlp import SWIGLU, GatedUnit, grouped_mlp

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
