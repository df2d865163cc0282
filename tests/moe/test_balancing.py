"""Balancing losses by hand: the group loss, and AdaMoE's with null experts as one kind."""

import pytest
import tiny
import torch

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.moe.balancing import group_loss, null_expert_loss


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


N, NZ, K, ALPHA = tiny.TINY["num_experts"], 4, tiny.TINY["num_experts_per_tok"], 0.1
ADAMOE = ZeroExpertConfig(NZ, group_loss_coeff=ALPHA, group_loss_variant="adamoe")


def adamoe_by_hand(picks: list[list[int]], scores, num_real: int):
    """arXiv 2406.13233, expert by expert: f of a null expert is the null experts' mean. Scores may be tensors."""
    experts = len(scores[0])
    slots = [expert for token in picks for expert in token]
    load = [slots.count(expert) / len(slots) for expert in range(experts)]
    null_load = sum(load[num_real:]) / (experts - num_real)
    total = 0.0
    for expert in range(experts):
        mean_score = sum(token[expert] for token in scores) / len(scores)
        total = total + (load[expert] if expert < num_real else null_load) * mean_score
    return experts * total


def slots_of(picks: list[list[int]], experts: int) -> torch.Tensor:
    return torch.bincount(torch.tensor(picks).flatten(), minlength=experts).double()


def scores_and_picks(experts: int, topk: int = 2, tokens: int = 9):
    generator = torch.Generator().manual_seed(experts)
    scores_TE = torch.randn(tokens, experts, generator=generator, dtype=torch.float64).softmax(1)
    return scores_TE, scores_TE.topk(topk, dim=1).indices.tolist()


@pytest.mark.parametrize(("n", "nz"), [(4, 2), (8, 3), (2, 7), (6, 1)])
def test_equals_the_formula_written_by_hand(n, nz):
    scores_TE, picks = scores_and_picks(n + nz)
    loss = null_expert_loss(slots_of(picks, n + nz), torch.tensor(9.0), scores_TE, n)
    assert float(loss) == pytest.approx(adamoe_by_hand(picks, scores_TE.tolist(), n), rel=1e-12)


def test_equal_loads_give_one_for_any_scores():
    scores_TE, _ = scores_and_picks(12)
    loss = null_expert_loss(torch.full((12,), 5.0), torch.tensor(9.0), scores_TE, 8)
    assert float(loss) == pytest.approx(1.0)


def test_only_the_sum_over_null_experts_counts_but_real_experts_count_each():
    scores_TE, picks = scores_and_picks(12, topk=4)
    slots_E, tokens = slots_of(picks, 12), torch.tensor(9.0)
    loss = float(null_expert_loss(slots_E, tokens, scores_TE, 8))
    assert len(set(slots_E[8:].tolist())) > 1 and len(set(slots_E[:8].tolist())) > 1
    for order in ([9, 10, 11, 8], [11, 8, 10, 9]):
        moved_E = torch.cat([slots_E[:8], slots_E[order]])
        assert float(null_expert_loss(moved_E, tokens, scores_TE, 8)) == pytest.approx(loss, rel=1e-12)
    moved_E = torch.cat([slots_E[:8], torch.tensor([slots_E[8:].sum(), 0, 0, 0])])
    assert float(null_expert_loss(moved_E, tokens, scores_TE, 8)) == pytest.approx(loss, rel=1e-12)
    moved_E = slots_E[[1, 2, 3, 4, 5, 6, 7, 0, 8, 9, 10, 11]]
    assert abs(float(null_expert_loss(moved_E, tokens, scores_TE, 8)) - loss) > 1e-3


def test_is_least_at_equal_loads_when_scores_follow_the_slots():
    losses = {}
    for share in torch.linspace(0.05, 0.95, 181, dtype=torch.float64).tolist():
        f_E = torch.tensor([(1 - share) / 8] * 8 + [share / 4] * 4, dtype=torch.float64)
        losses[share] = float(null_expert_loss(1e6 * f_E, torch.tensor(1.0), f_E[None], 8))
    best = min(losses, key=losses.get)
    assert best == pytest.approx(4 / 12, abs=5e-3) == ADAMOE.target_share(8)
    assert losses[best] == pytest.approx(1.0, abs=1e-3)


def test_parts_of_two_ranks_add_up_to_adamoes_whole():
    scores_TE, picks = scores_and_picks(12)
    slots_E, tokens = slots_of(picks, 12), torch.tensor(9.0)
    whole = null_expert_loss(slots_E, tokens, scores_TE, 8)
    parts = [null_expert_loss(slots_E, tokens, part, 8) for part in scores_TE.split([2, 7])]
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_no_tokens_give_adamoes_loss_no_nan():
    scores_TE = torch.zeros(0, 6, requires_grad=True)
    loss = null_expert_loss(torch.zeros(6), torch.zeros(()), scores_TE, 4)
    loss.backward()
    assert float(loss.detach()) == 0.0


def dense_loss(routed, logits_TE, valid_T, kind="softmax"):
    """The loss of the valid tokens of a dense routing, in the dtype of the logits."""
    scores_TE = logits_TE.sigmoid() if kind == "sigmoid" else logits_TE.softmax(1)
    scores_TE = (scores_TE / scores_TE.sum(1, keepdim=True))[valid_T]
    picks = [row.nonzero().flatten().tolist() for row in routed.map_TE[valid_T]]
    return adamoe_by_hand(picks, list(scores_TE), N)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("padded", [False, True])
def test_reaches_the_router_as_its_formula_says(kind, padded):
    overrides = {"moe_router_score_function": kind}
    router, hidden = tiny.router(ADAMOE, overrides), tiny.hidden_states()
    valid_T = torch.ones(13, dtype=torch.bool)
    if padded:
        valid_T[[0, 5, 11, 12]] = False
    probs_TN, _ = router(hidden, ~valid_T[:, None] if padded else None)
    mine = torch.autograd.grad(0 * probs_TN.sum(), (router.weight, hidden))

    weight, exact = (t.detach().double().requires_grad_() for t in (router.weight, hidden))
    logits_TE = exact.flatten(0, 1) @ weight.t()
    loss = ALPHA * dense_loss(tiny.dense_routing(logits_TE, K, N, kind), logits_TE, valid_T, kind)
    expected = torch.autograd.grad(loss, (weight, exact))
    tiny.close([g.double() for g in mine], list(expected), rtol=1e-4, atol=1e-7)
    assert float(router.routing_stats.group_loss) * ALPHA == pytest.approx(float(loss.detach()), rel=1e-5)
    assert expected[0].abs().max() > 1e-4


def test_with_renormalised_weights_it_makes_adamoes_layer():
    """Output and all gradients of a layer equal a dense loop in float64: weights are a softmax over the real picks."""
    zero = ZeroExpertConfig(
        NZ, group_loss_coeff=ALPHA, group_loss_variant="adamoe", renormalize_after_drop=True
    )
    layer, hidden = tiny.moe_layer(zero), tiny.hidden_states()
    draw = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    output, _ = layer(hidden)
    experts = tiny.expert_weights(layer)
    leaves = [hidden, layer.router.weight, *(weight for pair in experts for weight in pair)]
    mine = torch.autograd.grad((output * draw).sum(), leaves)

    exact, router, *flat = (leaf.detach().double().requires_grad_() for leaf in leaves)
    flat_TH = exact.flatten(0, 1)
    logits_TE = flat_TH @ router.t()
    routed = tiny.dense_routing(logits_TE, K, N)
    real_TN = routed.map_TE[:, :N]
    assert set(real_TN.sum(1).tolist()) >= {1, 2}  # different numbers of real experts
    masked_TN = logits_TE[:, :N].masked_fill(~real_TN, -torch.inf)
    weights_TN = masked_TN.softmax(1).where(real_TN, 0.0)  # without a real pick: nothing
    made = tiny.dense_experts(flat_TH, weights_TN, list(zip(flat[::2], flat[1::2]))).view_as(exact)
    tiny.close(output.double(), made, rtol=1e-4, atol=1e-5)
    loss = ALPHA * dense_loss(routed, logits_TE, torch.ones(13, dtype=torch.bool))
    expected = torch.autograd.grad((made * draw).sum() + loss, [exact, router, *flat])
    tiny.close([g.double() for g in mine], list(expected), rtol=1e-4, atol=1e-5)
    alone = torch.autograd.grad(0 * layer(hidden)[0].sum(), layer.router.weight)[0]
    assert alone.abs().max() > 1e-4  # the loss is not lost in the rest
