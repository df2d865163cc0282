"""The group loss with the whole model's zero share in place of a layer's own slots, against dense float64."""

import pytest
import tiny
import torch

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.errors import UserError
from zeda_megatron.moe.switches import set_model_share

N, NZ, K, ALPHA, W = tiny.TINY["num_experts"], 4, tiny.TINY["num_experts_per_tok"], 0.1, 2.0
ZERO = ZeroExpertConfig(NZ, group_loss_coeff=ALPHA, moe_zero_expert_weight=W, group_loss_budget="model")
BIASED = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.0,
}


def group_gradients(router, hidden, padding=None):
    """Gradients of the group loss alone."""
    probs_TN, _ = router(hidden, padding)
    return torch.autograd.grad(0 * probs_TN.sum(), (router.weight, hidden))


def dense(router, hidden, share, valid_T, kind):
    """alpha * (N + wNz) * ((1-share) P_R / N + share P_Z / (w Nz)) and its gradients, in float64."""
    weight, exact = (t.detach().double().requires_grad_() for t in (router.weight, hidden))
    logits_TE = exact.flatten(0, 1) @ weight.t()
    scores_TE = logits_TE.sigmoid() if kind == "sigmoid" else logits_TE.softmax(1)
    scores_TE = (scores_TE / scores_TE.sum(1, keepdim=True))[valid_T]
    mass_real, mass_zero = scores_TE[:, :N].sum(1).mean(), scores_TE[:, N:].sum(1).mean()
    loss = ALPHA * (N + W * NZ) * ((1 - share) * mass_real / N + share * mass_zero / (W * NZ))
    return float(loss.detach()), torch.autograd.grad(loss, (weight, exact))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.17, 0.8])
def test_loss_and_gradient_are_those_of_the_given_share(kind, padded, share):
    router, hidden = tiny.router(ZERO, {"moe_router_score_function": kind}), tiny.hidden_states()
    valid_T = torch.arange(13) < (9 if padded else 13)
    set_model_share(router, share)
    mine = group_gradients(router, hidden, ~valid_T[:, None] if padded else None)
    loss, expected = dense(router, hidden, share, valid_T, kind)
    tiny.close([g.double() for g in mine], list(expected), rtol=1e-4, atol=1e-7)
    assert float(router.routing_stats.group_loss) * ALPHA == pytest.approx(loss, rel=1e-5)
    assert expected[0].abs().max() > 1e-3


def test_without_a_share_a_layer_counts_its_own_slots():
    hidden = tiny.hidden_states()
    grads = []
    for budget in ("layer", "model"):
        router = tiny.router(ZeroExpertConfig(NZ, group_loss_coeff=ALPHA, group_loss_budget=budget))
        set_model_share(router, 0.9)
        set_model_share(router, None)
        grads.append(group_gradients(router, hidden))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("share", [None, 0.4])
def test_zero_slots_may_move_between_layers_without_any_change_of_the_loss(share):
    """The expert bias decides picks but no scores: it moves slots alone. Without a share of the model it matters."""
    hidden, ends = tiny.hidden_states(), []
    for shift in ((0.5, -0.5), (-0.5, 0.5)):
        layers = [tiny.router(ZERO, BIASED, seed=seed) for seed in (0, 1)]
        for layer, bias in zip(layers, shift):
            layer.expert_bias[N:] += bias
        set_model_share(torch.nn.ModuleList(layers), share)
        grads = torch.stack([group_gradients(layer, hidden)[0] for layer in layers])
        stats = [layer.routing_stats for layer in layers]
        ends.append(([s.zero_slots / s.slots for s in stats], grads, sum(s.group_loss for s in stats)))
    (shares, grads, loss), (moved_shares, moved_grads, moved_loss) = ends
    assert shares[0] - moved_shares[0] > 0.3 and moved_shares[1] - shares[1] > 0.3
    constant = torch.equal(grads, moved_grads) and loss == moved_loss
    assert constant == (share is not None)


def test_at_the_target_no_layer_is_pushed_wherever_it_stands():
    hidden = tiny.hidden_states()
    for bias in (-0.5, 0.5):
        router = tiny.router(ZERO, BIASED)
        router.expert_bias[N:] += bias
        pushed = group_gradients(router, hidden)[0].abs().max()
        set_model_share(router, ZERO.target_share(N))
        assert group_gradients(router, hidden)[0].abs().max() < 1e-6 < 1e-3 < pushed


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        ({"group_loss_variant": "authors"}, ["--group-loss-budget model", "--group-loss-variant authors"]),
        ({"group_loss_variant": "adamoe"}, ["--group-loss-budget model", "--group-loss-variant adamoe"]),
        (
            {"zero_expert_routing": "paired", "num_zero_experts": N, "group_loss_coeff": 0.0},
            ["--group-loss-budget model", "--paired-budget"],
        ),
        ({"group_loss_budget": "token"}, ["--group-loss-budget 'token'", "layer, model"]),
    ],
)
def test_a_budget_of_the_model_is_refused_where_it_has_no_meaning(zero, words):
    values = {"num_zero_experts": NZ, "group_loss_coeff": ALPHA, "group_loss_budget": "model"} | zero
    with pytest.raises(UserError) as caught:
        tiny.router(ZeroExpertConfig(**values))
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
