"""The widened router against a token-by-token definition, Megatron's own router and plain autograd."""

import pytest
import tiny
import torch
from megatron.core.models.gpt import GPTModel

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.errors import UserError
from zeda_megatron.models.build import decoder_block_spec
from zeda_megatron.moe.dispatch import install_dispatchers
from zeda_megatron.moe.router_dials import set_dials, zero_mask
from zeda_megatron.moe.spec import apply_zero_experts

N, NZ, K, ALPHA, W = tiny.TINY["num_experts"], 4, tiny.TINY["num_experts_per_tok"], 0.1, 2.0
SIGMOID = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.0,
    "moe_router_topk_scaling_factor": 1.8,
}
KINDS = {
    "softmax": ({}, {}),
    "pre_softmax": ({}, {"norm_topk_prob": False}),
    "sigmoid": (SIGMOID, {}),
}


def make(kind="softmax", seed=0, **zero):
    overrides, changes = KINDS[kind]
    return tiny.router(ZeroExpertConfig(**({"num_zero_experts": NZ} | zero)), overrides, seed, **changes)


def logits_of(router, hidden):
    return hidden.reshape(-1, hidden.shape[-1]) @ router.weight.t()


def reference(router, hidden, kind):
    scale = 1.8 if kind == "sigmoid" else 1.0
    return tiny.dense_routing(logits_of(router, hidden), K, N, kind, router.expert_bias, scale)


def authors_loss(scores_TE, map_TE, valid_T):
    """alpha * (N + wNz) * (share_R P_R / N + share_Z P_Z / (w Nz)), counts as constants."""
    scores_TE, map_TE = scores_TE[valid_T], map_TE[valid_T].float()
    share_zero = map_TE[:, N:].sum() / map_TE.sum()
    mass_real, mass_zero = scores_TE[:, :N].sum(1).mean(), scores_TE[:, N:].sum(1).mean()
    return ALPHA * (N + W * NZ) * ((1 - share_zero) * mass_real / N + share_zero * mass_zero / (W * NZ))


def full_scores(logits_TE, kind):
    scores_TE = logits_TE.sigmoid() if kind == "sigmoid" else logits_TE.softmax(1)
    return scores_TE / scores_TE.sum(1, keepdim=True)


def coefficients(seed=7, tokens=13):
    return torch.randn(tokens, N, generator=torch.Generator().manual_seed(seed))


def gradients(loss, router, hidden):
    return torch.autograd.grad(loss, (router.weight, hidden))


@pytest.mark.parametrize("kind", KINDS)
def test_top_k_runs_over_all_experts_and_zero_slots_are_dropped_without_renormalising(kind):
    router, hidden = make(kind), tiny.hidden_states()
    probs_TN, map_TN = router(hidden)
    expected = reference(router, hidden, kind)
    assert probs_TN.shape == map_TN.shape == (13, N) and map_TN.dtype == torch.bool
    assert torch.equal(map_TN, expected.map_TE[:, :N])
    tiny.close(probs_TN, expected.real_TN, rtol=1e-5, atol=1e-6)
    dropped_T = expected.map_TE[:, N:].sum(1)
    assert set(dropped_T.tolist()) >= {0, 1}  # the check would be empty otherwise
    assert (map_TN.sum(1) == K - dropped_T).all()
    kept_T = probs_TN.sum(1)
    assert (kept_T[dropped_T > 0] < (1.8 if kind == "sigmoid" else 1.0) - 1e-3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_kept_weights_equal_plain_autograd(kind):
    router, hidden = make(kind), tiny.hidden_states()
    mine = gradients((router(hidden)[0] * coefficients()).sum(), router, hidden)
    expected = gradients((reference(router, hidden, kind).real_TN * coefficients()).sum(), router, hidden)
    tiny.close(mine, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_renormalize_option_gives_the_weight_of_dropped_slots_to_the_others(kind):
    router, hidden = make(kind, renormalize_after_drop=True), tiny.hidden_states()
    probs_TN, map_TN = router(hidden)
    expected = reference(router, hidden, kind)
    total_T = expected.weights_TE.sum(1)
    torch.testing.assert_close(probs_TN.sum(1)[map_TN.any(1)], total_T[map_TN.any(1)])
    scaled_TN = expected.real_TN * (total_T / expected.real_TN.sum(1).clamp(min=1e-20))[:, None]
    tiny.close(probs_TN, scaled_TN, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_group_loss_reaches_the_router_as_its_formula_says(kind, padded):
    router, hidden = make(kind, group_loss_coeff=ALPHA, moe_zero_expert_weight=W), tiny.hidden_states()
    valid_T = torch.ones(13, dtype=torch.bool)
    if padded:
        valid_T[[0, 5, 11, 12]] = False
    probs_TN, _ = router(hidden, ~valid_T[:, None] if padded else None)
    mine = gradients((probs_TN * coefficients()).sum(), router, hidden)

    dense = reference(router, hidden, kind)
    loss = authors_loss(full_scores(logits_of(router, hidden), kind), dense.map_TE, valid_T)
    expected = gradients((dense.real_TN * coefficients()).sum() + loss, router, hidden)
    tiny.close(mine, expected, rtol=1e-4, atol=1e-6)
    assert float(router.routing_stats.group_loss) * ALPHA == pytest.approx(float(loss.detach()), rel=1e-5)
    alone = reference(router, hidden, kind).real_TN
    without = gradients((alone * coefficients()).sum(), router, hidden)
    assert not torch.allclose(mine[0], without[0], rtol=1e-3, atol=1e-5)  # the loss is not lost in the rest


def test_authors_variant_counts_a_fresh_top_k_without_bias_padding_included():
    hidden = tiny.hidden_states()
    valid_T = torch.arange(13) < 9
    losses, expected = {}, {}
    for variant in ("routed", "authors"):
        router = make("sigmoid", group_loss_coeff=ALPHA, moe_zero_expert_weight=W, group_loss_variant=variant)
        router.expert_bias[N:] += 0.5  # the bias decides many picks
        router(hidden, ~valid_T[:, None])
        losses[variant] = float(router.routing_stats.group_loss) * ALPHA
        scores_TE = full_scores(logits_of(router, hidden), "sigmoid")
        if variant == "routed":
            expected[variant] = authors_loss(scores_TE, reference(router, hidden, "sigmoid").map_TE, valid_T)
        else:
            fresh = tiny.dense_routing(logits_of(router, hidden), K, N, "sigmoid").map_TE
            expected[variant] = authors_loss(scores_TE, fresh, torch.ones(13, dtype=torch.bool))
    for variant, loss in losses.items():
        assert loss == pytest.approx(float(expected[variant].detach()), rel=1e-5)
    assert abs(losses["routed"] - losses["authors"]) > 1e-3


def test_variants_agree_for_softmax_without_padding():
    hidden = tiny.hidden_states()
    grads = []
    for variant in ("routed", "authors"):
        router = make(group_loss_coeff=ALPHA, group_loss_variant=variant)
        grads.append(gradients((router(hidden)[0] * coefficients()).sum(), router, hidden)[0])
    assert torch.equal(*grads)


def test_per_token_loss_scales_the_group_loss_by_the_real_tokens():
    valid_T = torch.arange(13) < 9
    grads = {}
    for per_token in (False, True):
        router = tiny.router(
            ZeroExpertConfig(NZ, group_loss_coeff=ALPHA), {"calculate_per_token_loss": per_token}
        )
        probs_TN, _ = router(tiny.hidden_states(), ~valid_T[:, None])
        grads[per_token] = torch.autograd.grad(0 * probs_TN.sum(), router.weight)[0]
    torch.testing.assert_close(grads[True], 9 * grads[False])


def test_padding_is_no_slot_of_the_statistics():
    router, hidden = make(), tiny.hidden_states()
    valid_T = torch.arange(13) % 3 != 0
    router(hidden, ~valid_T[:, None])
    map_TE = reference(router, hidden, "softmax").map_TE[valid_T]
    assert int(router.routing_stats.slots) == K * int(valid_T.sum()) == int(map_TE.sum())
    assert int(router.routing_stats.zero_slots) == int(map_TE[:, N:].sum()) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [32, 31])
def test_masked_routing_is_bit_equal_to_megatrons_own_router(kind, width):
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter

    overrides, changes = KINDS[kind]
    changes = changes | {"hidden_size": width}
    wide = tiny.router(ZeroExpertConfig(NZ, group_loss_coeff=ALPHA), overrides, **changes)
    stock = TopKRouter(tiny.megatron_config(overrides, **changes), get_default_pg_collection())
    with torch.no_grad():
        stock.weight.copy_(wide.weight[:N])
        if stock.expert_bias is not None:
            stock.expert_bias.copy_(wide.expert_bias[:N])
    results = []
    set_dials(wide, zero_mask=True)
    for router in (wide, stock):
        hidden = tiny.hidden_states(size=width)
        probs_TN, map_TN = router(hidden)
        grad_weight, grad_hidden = gradients((probs_TN * coefficients()).sum(), router, hidden)
        results.append((probs_TN, map_TN, grad_weight[:N], grad_hidden))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_mask_is_a_visit_and_not_a_change():
    router, hidden = make(), tiny.hidden_states()
    before = router(hidden)[0]
    with zero_mask(router):
        assert router.dials.zero_mask and not torch.equal(router(hidden)[0], before)
    assert not router.dials.zero_mask and torch.equal(router(hidden)[0], before)
    with pytest.raises(RuntimeError), zero_mask(router):
        raise RuntimeError
    assert not router.dials.zero_mask


def test_no_zero_experts_route_like_the_stock_router():
    router, hidden = make(num_zero_experts=0), tiny.hidden_states()
    probs_TN, map_TN = router(hidden)
    tiny.close(probs_TN, reference(router, hidden, "softmax").real_TN, rtol=1e-5, atol=1e-6)
    assert (map_TN.sum(1) == K).all() and int(router.routing_stats.zero_slots) == 0


def test_group_loss_rests_in_evaluation_without_grad_and_under_the_mask():
    router = make(group_loss_coeff=ALPHA)
    hidden = tiny.hidden_states()
    with torch.no_grad():
        router(hidden)
    with zero_mask(router):
        router(hidden)
    router.eval()
    router(hidden)
    assert router.routing_stats.group_loss is None


@pytest.mark.parametrize(
    ("overrides", "zero", "words"),
    [
        (
            {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01},
            {},
            ["aux_loss", "Nz/(N+Nz)"],
        ),
        (
            {"moe_router_load_balancing_type": ["none", "seq_aux_loss"], "moe_aux_loss_coeff": [0.0, 0.01]},
            {},
            ["seq_aux_loss"],
        ),
        (SIGMOID | {"moe_router_bias_update_rate": 1e-3}, {}, ["--moe-router-bias-update-rate"]),
        ({"moe_expert_capacity_factor": 1.0}, {}, ["--moe-expert-capacity-factor"]),
        ({"moe_router_topk": 9}, {}, ["--moe-router-topk 9", "8"]),
        (
            {},
            {"num_zero_experts": 0, "group_loss_coeff": 0.1},
            ["grouped_aux_loss", "--num-zero-experts is 0"],
        ),
        ({}, {"num_zero_experts": -1, "group_loss_coeff": 0.1}, ["--num-zero-experts -1"]),
        ({}, {"group_loss_coeff": 0.1, "moe_zero_expert_weight": 0.0}, ["--moe-zero-expert-weight 0.0"]),
        ({}, {"group_loss_variant": "mine"}, ["--group-loss-variant 'mine'", "routed, authors"]),
        ({}, {"zero_experts_type": "loud"}, ["--zero-experts-type 'loud'", "zero, copy, learned"]),
    ],
)
def test_settings_that_work_against_zero_experts_are_refused(overrides, zero, words):
    with pytest.raises(UserError) as caught:
        tiny.router(ZeroExpertConfig(**({"num_zero_experts": NZ} | zero)), overrides)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


N, NZ, K = tiny.TINY["num_experts"], 4, tiny.TINY["num_experts_per_tok"]
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def layer(kind, dispatcher="alltoall"):
    made = tiny.moe_layer(
        ZeroExpertConfig(NZ, zero_experts_type=kind), {"moe_token_dispatcher_type": dispatcher}
    )
    if kind == "learned":
        torch.nn.init.zeros_(made.router.zero_output.bias)  # tiny.moe_layer draws every parameter
    return made


def same_weights(target, source):
    return target.load_state_dict(source.state_dict(), strict=False)


def zero_weights(made, hidden):
    flat_TH = hidden.reshape(-1, hidden.shape[-1])
    return tiny.dense_routing(flat_TH @ made.router.weight.t(), K, N).weights_TE[:, N:]


def test_learned_zero_experts_are_born_as_zeros():
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from zeda_megatron.moe.router import ZeroExpertRouter

    zero = ZeroExpertConfig(NZ, zero_experts_type="learned")
    router = ZeroExpertRouter(tiny.megatron_config(), get_default_pg_collection(), zero=zero)
    assert torch.equal(router.zero_output.bias, torch.zeros(NZ, 32))


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_learned_starts_bit_equal_to_zero_and_gets_gradients(dispatcher):
    zero, learned, hidden = layer("zero", dispatcher), layer("learned", dispatcher), tiny.hidden_states()
    same_weights(learned, zero)
    output, _ = learned(hidden)
    assert torch.equal(output, zero(hidden)[0])
    coefficients = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    bias = learned.router.zero_output.bias
    grad_bias = torch.autograd.grad((output * coefficients).sum(), bias)[0]
    # d/db_j of sum_t c_t * w_tj * b_j
    tiny.close(grad_bias, zero_weights(learned, hidden).t() @ coefficients.view(13, 32), rtol=1e-4, atol=1e-5)
    assert grad_bias.abs().sum() > 0


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_learned_adds_weight_times_bias(dispatcher):
    zero, learned, hidden = layer("zero", dispatcher), layer("learned", dispatcher), tiny.hidden_states()
    same_weights(learned, zero)
    bias = learned.router.zero_output.bias
    torch.nn.init.normal_(bias)
    expected = zero(hidden)[0] + (zero_weights(learned, hidden) @ bias).view_as(hidden)
    tiny.close(learned(hidden)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_copy_adds_weight_times_input(dispatcher):
    zero, copy, hidden = layer("zero", dispatcher), layer("copy", dispatcher), tiny.hidden_states()
    same_weights(copy, zero)
    weight_T = zero_weights(copy, hidden).sum(1)
    expected = zero(hidden)[0] + weight_T[:, None, None] * hidden
    output = copy(hidden)[0]
    tiny.close(output, expected, rtol=1e-4, atol=1e-5)
    coefficients = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    grads = [
        torch.autograd.grad((out * coefficients).sum(), [hidden, copy_or_zero.router.weight])
        for out, copy_or_zero in (
            (output, copy),
            (zero(hidden)[0] + zero_weights(zero, hidden).sum(1)[:, None, None] * hidden, zero),
        )
    ]
    tiny.close(*grads, rtol=1e-4, atol=1e-5)


def model(kind, overrides):
    config = tiny.megatron_config(overrides)
    block = apply_zero_experts(
        decoder_block_spec(config), ZeroExpertConfig(NZ, zero_experts_type=kind), "loop"
    )
    made = GPTModel(config, block, vocab_size=96, max_sequence_length=64, position_embedding_type="rope")
    install_dispatchers(made)
    tiny.draw(made)
    return made.train()


@pytest.mark.parametrize("kind", ["zero", "copy", "learned"])
def test_full_recomputation_changes_neither_loss_nor_gradients_nor_counts(kind):
    tokens = torch.arange(12)[None]
    results = []
    for overrides in ({}, FULL):
        made = model(kind, overrides)
        loss = made(tokens, tokens, None, labels=tokens.roll(-1, 1)).sum()
        loss.backward()
        counts = [
            (int(r.routing_stats.zero_slots), int(r.routing_stats.slots))
            for r in (x.mlp.router for x in made.decoder.layers)
        ]
        results.append((loss.detach(), {n: p.grad for n, p in made.named_parameters()}, counts))
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=0, atol=0)
    assert results[0][2] == results[1][2] and all(slots == 12 * K for _, slots in results[0][2])
    if kind == "learned":
        assert results[1][1]["decoder.layers.0.mlp.router.zero_output.bias"].abs().sum() > 0
