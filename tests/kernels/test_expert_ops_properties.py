"""What holds for any group sizes: order of experts, splits, empty groups."""

import pytest
import torch
from groups import Draw, ends_of, mlp_inputs

import zeda_kernels.expert_ops  # noqa: F401  (registers torch.ops.zeda)

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed: extra test")
st = hypothesis.strategies
ops = torch.ops.zeda
fast = hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
sizes = st.lists(st.sampled_from([0, 0, 1, 7, 8, 63, 64, 65]), min_size=1, max_size=6) | st.builds(
    lambda experts, taker, rows: [rows if e == taker % experts else 0 for e in range(experts)],
    st.sampled_from([1, 31, 32, 33, 64, 128, 129]),
    st.integers(0, 128),
    st.sampled_from([0, 1, 129]),
)
"""Small mixed groups, and many experts of which one takes all rows, or none."""
H, WIDTH = 8, 4


def outputs(x, probs, ends, fc1, fc2):
    out, pre = ops.expert_mlp(x, probs, ends, fc1, fc2)
    return out, ops.expert_mlp_backward(torch.cos(out), x, pre, probs, ends, fc1, fc2)


@fast
@hypothesis.given(sizes, st.randoms(use_true_random=False))
def test_reordering_experts_reorders_outputs(counts, random):
    x, probs, ends, fc1, fc2 = mlp_inputs(counts, H, WIDTH)
    order = list(range(len(counts)))
    random.shuffle(order)
    parts = torch.arange(len(x)).split(counts)
    moved = torch.cat([parts[e] for e in order])
    out, (dx, dprobs, dfc1, dfc2) = outputs(x, probs, ends, fc1, fc2)
    other = ends_of([counts[e] for e in order])
    mine, grads = outputs(x[moved], probs[moved], other, [fc1[e] for e in order], [fc2[e] for e in order])
    torch.testing.assert_close(mine, out[moved])
    torch.testing.assert_close(grads, (dx[moved], dprobs[moved], dfc1[order], dfc2[order]))


@fast
@hypothesis.given(sizes, st.data())
def test_a_group_split_in_two_gives_the_concatenation(counts, data):
    x, probs, ends, fc1, fc2 = mlp_inputs(counts, H, WIDTH)
    chosen = data.draw(st.integers(0, len(counts) - 1))
    first = data.draw(st.integers(0, counts[chosen]))
    split = [*counts[:chosen], first, counts[chosen] - first, *counts[chosen + 1 :]]

    def twice(weights):
        return [*weights[: chosen + 1], weights[chosen], *weights[chosen + 1 :]]

    out, (dx, dprobs, *whole) = outputs(x, probs, ends, fc1, fc2)
    mine, (dx2, dprobs2, *parts) = outputs(x, probs, ends_of(split), twice(fc1), twice(fc2))
    torch.testing.assert_close((mine, dx2, dprobs2), (out, dx, dprobs))
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a[chosen], b[chosen] + b[chosen + 1])


@fast
@hypothesis.given(sizes)
def test_weight_gradients_of_empty_groups_are_zero_or_unchanged(counts):
    x, _, ends, _, _ = mlp_inputs(counts, H, WIDTH)
    dy = torch.sin(x)
    empty = [e for e, count in enumerate(counts) if count == 0]
    fresh = ops.grouped_wgrad(dy, x, ends)
    assert not fresh[empty].any()
    torch.testing.assert_close(fresh.sum(0), dy.T @ x)
    for accumulate in (False, True):
        poisoned = Draw(seed=3).experts(len(counts), H, H)
        before = torch.stack(poisoned)
        ops.grouped_wgrad_(poisoned, dy, x, ends, accumulate)
        torch.testing.assert_close(torch.stack(poisoned), fresh + before * accumulate)
