"""Rules that thin out picks, against their definition on plain lists."""

import pytest
import tiny
import torch

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.errors import UserError
from zeda_megatron.moe.pick_rules import (
    DynamicSkipping,
    Piggyback,
    StaticTopK,
    TopP,
    apply_pick_rule,
    parse_pick_rule,
    together,
)
from zeda_megatron.moe.router_dials import set_dials, zero_mask

N, K = tiny.TINY["num_experts"], tiny.TINY["num_experts_per_tok"]


def by_definition(rule, weights: list[float]) -> list[int]:
    """Numbers of the kept experts of one token; `weights` per expert, 0 = not picked."""
    picks = sorted((e for e, w in enumerate(weights) if w > 0), key=lambda e: -weights[e])
    if isinstance(rule, StaticTopK):
        return picks[: rule.k]
    if isinstance(rule, DynamicSkipping):
        return [e for e in picks if weights[e] >= rule.ratio * weights[picks[0]]]
    kept, mass, total = [], 0.0, sum(weights)
    for e in picks:
        if kept and mass / total >= rule.p:
            break
        kept.append(e)
        mass += weights[e]
    return kept


def routing(tokens=50, seed=0):
    logits_TN = 2 * torch.randn(tokens, N, generator=torch.Generator().manual_seed(seed))
    weights_TN = tiny.dense_routing(logits_TN, 4, N).weights_TE
    weights_TN[:5, :] *= weights_TN[:5, :] > 0.2  # fewer picks than K
    weights_TN[5] = 0  # none at all
    return weights_TN


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    "rule",
    [
        StaticTopK(1),
        StaticTopK(2),
        StaticTopK(9),
        DynamicSkipping(0.4),
        DynamicSkipping(1.0),
        TopP(0.7),
        TopP(0.0),
    ],
)
def test_keeps_what_the_rule_says(rule, renormalize):
    rule = type(rule)(next(iter(vars(rule).values())), renormalize)
    weights_TN = routing()
    probs_TN, map_TN = apply_pick_rule(rule, weights_TN, weights_TN > 0, 4)
    for weights, probs, kept in zip(weights_TN.tolist(), probs_TN.tolist(), map_TN.tolist()):
        wanted = by_definition(rule, weights)
        assert sorted(wanted) == [e for e, keep in enumerate(kept) if keep]
        scale = sum(weights) / sum(weights[e] for e in wanted) if renormalize and wanted else 1.0
        assert probs == pytest.approx(
            [w * scale if e in wanted else 0.0 for e, w in enumerate(weights)], rel=1e-5
        )


@pytest.mark.parametrize("rule", [DynamicSkipping(0.0), TopP(1.0), StaticTopK(K)])
def test_ends_of_the_range_keep_every_pick(rule):
    weights_TN = tiny.dense_routing(
        torch.randn(20, N, generator=torch.Generator().manual_seed(2)), K, N
    ).weights_TE
    probs_TN, map_TN = apply_pick_rule(rule, weights_TN, weights_TN > 0, K)
    assert torch.equal(probs_TN, weights_TN) and torch.equal(map_TN, weights_TN > 0)


def test_gradient_flows_through_kept_weights_only():
    weights_TN = routing().requires_grad_()
    probs_TN, map_TN = apply_pick_rule(StaticTopK(2), weights_TN, weights_TN > 0, 4)
    probs_TN.sum().backward()
    assert torch.equal(weights_TN.grad, map_TN.float())


def test_rule_in_the_router_thins_the_real_picks_and_counts_the_dropped_as_zero():
    router, hidden = tiny.router(ZeroExpertConfig(4)), tiny.hidden_states()
    set_dials(router, pick_rule=StaticTopK(1))
    probs_TN, map_TN = router(hidden)
    dense = tiny.dense_routing(hidden.reshape(13, -1) @ router.weight.t(), K, N)
    best_TN = (
        torch.zeros_like(dense.real_TN).scatter(1, dense.real_TN.argmax(1, keepdim=True), 1) * dense.real_TN
    )
    tiny.close(probs_TN, best_TN, rtol=1e-5, atol=1e-6)
    real = int(map_TN.sum())
    assert int(router.routing_stats.zero_slots) == 13 * K - real and real <= 13
    with zero_mask(router):
        assert (router(hidden)[1].sum(1) == K).all()  # the masked model is the teacher: no rule
    assert router.dials.pick_rule == StaticTopK(1)


@pytest.mark.parametrize("first", [1, 2])
def test_tokens_decoded_together_pick_among_the_experts_that_one_of_them_asked_for(first):
    """Batches of four, one token of padding; K=2 of 8 experts."""
    router, hidden = tiny.router(ZeroExpertConfig(0)), tiny.hidden_states(13)
    set_dials(router, pick_rule=Piggyback(first, 4))
    padding_T = torch.arange(13) == 5
    probs_TN, map_TN = router(hidden, padding_T[:, None])
    logits = (hidden.reshape(13, -1) @ router.weight.t()).tolist()
    best = [sorted(range(N), key=lambda e, row=row: -row[e]) for row in logits]
    for token in range(13):
        needed = {e for t in range(token % 4, 13, 4) if t != 5 for e in best[t][:first]} | set(
            best[token][:first]
        )
        picks = [e for e in best[token] if e in needed][:K]
        assert sorted(picks) == map_TN[token].nonzero().flatten().tolist()
        weights = torch.tensor([logits[token][e] for e in picks]).softmax(0)
        tiny.close(probs_TN[token, picks], weights, rtol=1e-5, atol=1e-6)
    with zero_mask(router):
        assert (router(hidden)[1].sum(1) == K).all()


@pytest.mark.parametrize(("tokens", "batch"), [(13, 4), (3, 16), (32, 16), (0, 4), (5, 1)])
def test_batches_are_no_larger_than_said_and_neighbours_are_apart(tokens, batch):
    groups = together(tokens, batch).tolist()
    assert all(groups.count(one) <= batch for one in groups)
    assert len(set(groups)) == -(-tokens // batch)
    assert len(set(groups)) < 2 or all(a != b for a, b in zip(groups, groups[1:]))


def test_routers_that_choose_by_more_than_logits_refuse_to_piggyback(one_process):
    from families import FAMILIES

    from zeda_megatron.models.architecture import read_architecture
    from zeda_megatron.models.build import build_gpt_model, transformer_config

    arch = read_architecture(FAMILIES["glm4_moe_lite"].make().config.to_dict())
    model = build_gpt_model(arch, transformer_config(arch), ZeroExpertConfig(0))
    set_dials(model, pick_rule=Piggyback(1))
    tokens = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(
        UserError, match="--moe-pick-rule oea: this model's routers choose by more than their logits"
    ):
        model(tokens, tokens, None)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("oea=1", Piggyback(1, 16)),
        ("oea=2/32", Piggyback(2, 32)),
        ("topk=2", StaticTopK(2)),
        ("skip=0.4", DynamicSkipping(0.4)),
        ("top_p=0.7, renormalize", TopP(0.7, renormalize=True)),
    ],
)
def test_text_becomes_a_rule(text, rule):
    assert parse_pick_rule(text) == rule


@pytest.mark.parametrize(
    "text",
    [
        "topk=0",
        "topk=x",
        "skip=2",
        "top_p",
        "best=1",
        "topk=2,again",
        "",
        "skip=nan",
        "oea=0",
        "oea=1/0",
        "oea",
        "oea=1,renormalize",
    ],
)
def test_text_that_is_no_rule_is_a_user_error(text):
    with pytest.raises(UserError, match="--moe-pick-rule"):
        parse_pick_rule(text)
