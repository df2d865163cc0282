"""Rank correlation against its definition."""

import pytest
import torch

from zeda_megatron.evaluation.quality.spearman import average_ranks, spearman


def ranks(values: list[float]) -> list[float]:
    """By counting: the values below, and half of the ties."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def brute_force(x: list[float], y: list[float]) -> float:
    """Pearson's coefficient of the ranks, as its formula stands."""
    a, b = ranks(x), ranks(y)
    n, mean = len(x), (len(x) + 1) / 2
    cov = sum((p - mean) * (q - mean) for p, q in zip(a, b)) / n
    spread = [(sum((p - mean) ** 2 for p in r) / n) ** 0.5 for r in (a, b)]
    return cov / (spread[0] * spread[1])


@pytest.mark.parametrize("values", [5, 2, 1000], ids=["many ties", "two values", "hardly a tie"])
def test_spearman_equals_brute_force_with_ties(values):
    draw = torch.Generator().manual_seed(values)
    for n in (2, 3, 40, 301):
        x = torch.randint(0, values, (n,), generator=draw).double()
        y = torch.randint(0, 7, (n,), generator=draw) + x.long() % 3
        x[0], x[1], y[0], y[1] = 0, 1, 0, 1
        assert spearman(x, y) == pytest.approx(brute_force(x.tolist(), y.tolist()), abs=1e-12)
        assert average_ranks(x).tolist() == ranks(x.tolist())


def test_only_the_order_counts():
    x = torch.tensor([0.3, -2.0, 7.0, 1.0, 0.4])
    assert spearman(x, x.exp()) == 1.0 and spearman(x, -(x**3)) == -1.0


@pytest.mark.parametrize("constant", [torch.zeros(4), torch.full((4,), 0.1, dtype=torch.float64)])
def test_a_constant_has_no_correlation(constant):
    x = torch.arange(4.0)
    assert spearman(constant, x) is None and spearman(x, constant) is None
    assert spearman(x[:0], x[:0]) is None and spearman(x[:1], x[:1]) is None


@pytest.mark.parametrize("other", [torch.arange(3.0), torch.tensor([0.0, 1.0, 2.0, torch.nan]), torch.eye(4)])
def test_what_cannot_be_ranked_is_refused(other):
    with pytest.raises(ValueError, match="rank correlation"):
        spearman(torch.arange(4.0), other)
