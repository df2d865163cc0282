"""Routing of GLM-4.7-Flash with zero experts: bias chooses, scores weigh, zero slots drop, a shared expert adds."""

from dataclasses import replace

import pytest
import tiny
import torch

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.errors import UserError
from zeda_megatron.moe.balancing import RoutedSlots
from zeda_megatron.moe.stats import RoutingStats

pytestmark = pytest.mark.usefixtures("one_process")
SIGMOID = {
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.0,
    "moe_router_topk_scaling_factor": 1.8,
}
SHARED = SIGMOID | {"moe_shared_expert_intermediate_size": 16}
ZERO = ZeroExpertConfig(4, group_loss_coeff=0.1)


def attached(router, hidden):
    """The group loss that a training pass logs."""
    router.train()
    router.routing_stats = RoutingStats()
    router(hidden)
    return float(router.routing_stats.group_loss)


@torch.no_grad()
def test_layer_follows_the_definition_token_by_token():
    layer = tiny.moe_layer(ZERO, SHARED).eval()
    hidden = tiny.hidden_states().detach()
    flat, router = hidden[:, 0], layer.router
    routed = tiny.dense_routing(flat @ router.weight.t(), 3, 8, "sigmoid", router.expert_bias, 1.8)
    expected = tiny.dense_experts(flat, routed.real_TN, tiny.expert_weights(layer))
    shared = layer.shared_experts
    ones = torch.ones(len(flat), 1)
    expected += tiny.dense_experts(flat, ones, [(shared.linear_fc1.weight, shared.linear_fc2.weight)])
    output, _ = layer(hidden)
    tiny.close(output[:, 0], expected, rtol=1e-5, atol=1e-5)
    # Weights of all picks, zero experts among them, sum to the scale; what was dropped is not given to the others.
    torch.testing.assert_close(routed.weights_TE.sum(1), torch.full((13,), 1.8))
    dropped = routed.map_TE[:, 8:].any(1)
    assert dropped.any() and (routed.real_TN.sum(1)[dropped] < 1.8 - 1e-3).all()


@torch.no_grad()
def test_the_bias_chooses_and_does_not_weigh():
    router = tiny.router(ZERO, SIGMOID).eval()
    hidden = tiny.hidden_states().detach()
    router.expert_bias.zero_()
    router.expert_bias[8:] = 10.0  # more zero experts than picks
    probs, routing_map = router(hidden)
    assert not routing_map.any() and not probs.any()
    router.expert_bias.zero_()
    router.expert_bias[2] = 10.0
    probs, routing_map = router(hidden)
    assert routing_map[:, 2].all() and probs.max() <= 1.8


def test_training_leaves_the_bias_alone():
    router = tiny.router(ZERO, SIGMOID)
    before = router.expert_bias.clone()
    probs, _ = router(tiny.hidden_states())
    probs.sum().backward()
    assert torch.equal(router.expert_bias, before) and not router.expert_bias.requires_grad
    assert not router.local_tokens_per_expert.any()  # what Megatron's updates are made of


def test_bias_updates_are_refused():
    with pytest.raises(UserError, match="--moe-router-bias-update-rate must be 0"):
        tiny.router(ZERO, SIGMOID | {"moe_router_bias_update_rate": 1e-3})


def test_group_loss_counts_what_was_routed_where_the_authors_count_a_fresh_top_k():
    """A bias that favours zero experts moves the routed share; the authors' loss does not see it."""
    router = tiny.router(ZERO, SIGMOID)
    hidden = tiny.hidden_states(tokens=200)
    seen = {}
    for favour in (0.0, 0.5):
        with torch.no_grad():
            router.expert_bias.zero_()
            router.expert_bias[8:] = favour
            logits = router.gating(hidden).reshape(-1, 12)
        routed = tiny.dense_routing(logits, 3, 8, "sigmoid", router.expert_bias).map_TE
        ours = RoutedSlots.count(logits, routed, None, "sigmoid")
        authors = RoutedSlots.count_fresh(logits, 3, "sigmoid")
        shares = [float(r.slots_E[8:].sum() / r.slots_E.sum()) for r in (ours, authors)]
        mass = ours.scores_TE.sum(0) / 200
        for variant, share in zip(("routed", "authors"), shares, strict=True):
            router.zero = replace(ZERO, group_loss_variant=variant)
            real, zero = float(mass[:8].sum()), float(mass[8:].sum())
            # N = 8, w * Nz = 2 * 4
            expected = 16 * ((1 - share) * real / 8 + share * zero / 8)
            assert attached(router, hidden) == pytest.approx(expected, rel=1e-5)
        seen[favour] = shares
    assert seen[0.0][0] == seen[0.0][1] == seen[0.5][1]
    assert seen[0.5][0] > seen[0.5][1] + 0.2
