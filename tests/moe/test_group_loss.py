"""The group loss against the paper's formula, written out here with plain numbers."""

import pytest
import torch

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.moe.group_loss import group_loss


def by_hand(picks: list[list[int]], scores: list[list[float]], n: int, nz: int, w: float) -> float:
    """arXiv 2605.18643: sum over the two groups of (share of slots) * (mean score mass), each over its
    weighted size n or w*nz, times n + w*nz. Plain Python on lists."""
    slots = [expert for token in picks for expert in token]
    share_zero = sum(expert >= n for expert in slots) / len(slots)
    mass_zero = sum(sum(token[n:]) for token in scores) / len(scores)
    mass_real = sum(sum(token[:n]) for token in scores) / len(scores)
    return (n + w * nz) * ((1 - share_zero) * mass_real / n + share_zero * mass_zero / (w * nz))


def ours(picks, scores_TE, n, nz, w):
    slots = torch.tensor([expert for token in picks for expert in token])
    real, zero = (slots < n).sum().float(), (slots >= n).sum().float()
    return group_loss(real, zero, torch.tensor(float(len(picks))), scores_TE, n, nz, w)


@pytest.mark.parametrize(("n", "nz", "w"), [(4, 2, 1.0), (4, 2, 2.0), (8, 3, 3.5), (2, 7, 0.4)])
def test_equals_the_formula_of_the_paper(n, nz, w):
    scores_TE = torch.randn(9, n + nz, generator=torch.Generator().manual_seed(n)).softmax(1)
    picks = scores_TE.topk(2, dim=1).indices.tolist()
    assert float(ours(picks, scores_TE, n, nz, w)) == pytest.approx(
        by_hand(picks, scores_TE.tolist(), n, nz, w)
    )


@pytest.mark.parametrize(("n", "nz", "w"), [(128, 64, 2.0), (64, 32, 2.0), (8, 4, 1.0), (8, 2, 3.0)])
def test_is_least_at_the_target_share_when_scores_follow_the_slots(n, nz, w):
    total = 10_000
    losses = []
    for zero in range(total + 1):
        share = zero / total
        scores_TE = torch.zeros(1, n + nz, dtype=torch.float64)
        scores_TE[0, :n], scores_TE[0, n:] = (1 - share) / n, share / nz
        counts = (torch.tensor(float(x), dtype=torch.float64) for x in (total - zero, zero, 1))
        losses.append(float(group_loss(*counts, scores_TE, n, nz, w)))
    best = min(range(total + 1), key=losses.__getitem__) / total
    assert best == pytest.approx(w * nz / (n + w * nz), abs=1e-3)
    assert best == pytest.approx(ZeroExpertConfig(nz, moe_zero_expert_weight=w).target_share(n), abs=1e-3)


def test_gradient_flows_through_the_scores_alone():
    real, zero, tokens = (torch.tensor(float(x), requires_grad=True) for x in (10, 6, 8))
    scores_TE = torch.rand(8, 6).softmax(1).requires_grad_()
    group_loss(real.detach(), zero.detach(), tokens.detach(), scores_TE, 4, 2, 2.0).backward()
    # d/ds of a real expert: (N + wNz) * f_R / (N * T); of a zero expert: (N + wNz) * f_Z / (w Nz * T).
    expected = torch.tensor([8 * (10 / 16) / 4 / 8] * 4 + [8 * (6 / 16) / 4 / 8] * 2).expand(8, 6)
    torch.testing.assert_close(scores_TE.grad, expected)


def test_parts_of_two_ranks_add_up_to_the_whole():
    scores_TE = torch.rand(10, 6).softmax(1)
    counts = [torch.tensor(float(x)) for x in (12, 8, 10)]
    whole = group_loss(*counts, scores_TE, 4, 2, 2.0)
    parts = [group_loss(*counts, part, 4, 2, 2.0) for part in scores_TE.split([3, 7])]
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_no_tokens_give_zero_and_no_nan():
    nothing = torch.zeros(())
    scores_TE = torch.zeros(0, 6, requires_grad=True)
    loss = group_loss(nothing, nothing, nothing, scores_TE, 4, 2, 2.0)
    loss.backward()
    assert float(loss) == 0.0
