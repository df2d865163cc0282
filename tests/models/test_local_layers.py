"""Attention where Transformer Engine is not: groups of queries share their keys."""

import pytest
import torch

from zeda_megatron.models.local_layers import attend


def attention(query, key, value, hidden, causal: bool, scale: float) -> torch.Tensor:
    """Softmax over the keys that a query may see, in float64, head after head."""
    made = torch.empty(query.shape, dtype=torch.float64)
    group = query.shape[2] // key.shape[2]
    for head in range(query.shape[2]):
        q, k, v = (
            x.double()[:, :, n] for x, n in ((query, head), (key, head // group), (value, head // group))
        )
        scores_BQK = torch.einsum("qbd,kbd->bqk", q, k) * scale
        if hidden is not None:
            scores_BQK = scores_BQK.masked_fill(hidden[:, 0], -torch.inf)
        if causal:
            scores_BQK = scores_BQK.masked_fill(torch.ones(scores_BQK.shape[1:]).triu(1).bool(), -torch.inf)
        made[:, :, head] = torch.einsum("bqk,kbd->qbd", scores_BQK.softmax(-1), v)
    return made.flatten(2)


@pytest.mark.parametrize("case", ["causal", "masked", "one token"])
def test_grouped_queries_attend_alike_with_gradients_and_without(case):
    draw = torch.Generator().manual_seed(0)
    queries = 1 if case == "one token" else 7
    query = torch.randn(queries, 3, 6, 8, generator=draw)
    key, value = (torch.randn(7, 3, 2, 8, generator=draw) for _ in range(2))
    hidden = None
    if case != "causal":
        hidden = (torch.arange(7) < torch.tensor([0, 2, 4])[:, None])[:, None, None].expand(3, 1, queries, 7)
    expected = attention(query, key, value, hidden, case == "causal", 0.3)
    with torch.no_grad():
        alone = attend(query, key, value, hidden, case == "causal", 0.3)
    learning = attend(query, key, value, hidden, case == "causal", 0.3)
    torch.testing.assert_close(alone.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(learning.double(), expected, rtol=1e-5, atol=1e-6)
