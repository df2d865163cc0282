"""Paired zero experts against a token-by-token definition: scores, kept picks, weights, gradients."""

import math

import pytest
import tiny
import torch

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.errors import UserError
from zeda_megatron.models.build import build_gpt_model
from zeda_megatron.moe.paired import KEEP_ALL, paired_modules
from zeda_megatron.moe.router_dials import set_dials, set_thresholds
from zeda_megatron.moe.stats import collect, reset

N, K = tiny.TINY["num_experts"], tiny.TINY["num_experts_per_tok"]
PAIRED = ZeroExpertConfig(N, zero_expert_routing="paired")
AWAKE = ZeroExpertConfig(N, "low_rank", "paired", paired_head_width=5, stand_in_rank=3)
SIGMOID = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.0,
    "moe_router_topk_scaling_factor": 1.8,
}


def make(score="weight+head+residual", overrides=None, threshold=0.0, **changes):
    """A router with drawn weights and head."""
    zero = ZeroExpertConfig(N, zero_expert_routing="paired", paired_score=score)
    router = tiny.router(zero, overrides, **changes)
    set_thresholds(router, [threshold])
    return router


def route(router, hidden, residual=None, padding=None):
    """What the layer does: the norm's hook sees the residual stream, then the router runs."""
    if residual is not None:
        router.paired.see_residual(None, (residual,))
    return router(hidden) if padding is None else router(hidden, padding)


def definition(router, hidden, residual, kind="softmax", scale=1.0):
    """Weights [T, N] and scores [T, N] with plain loops, by the formula."""
    x_TH = hidden.detach().reshape(-1, hidden.shape[-1])
    residual = residual.detach()
    dense = tiny.dense_routing(x_TH @ router.weight.t(), K, N, kind, router.expert_bias, scale)
    scores = torch.full((len(x_TH), N), math.nan)
    for t, row in enumerate(dense.weights_TE.detach()):
        norm = math.sqrt(sum(float(v) ** 2 for v in residual.reshape(-1, hidden.shape[-1])[t]))
        for i in row.nonzero().flatten().tolist():
            head = float(router.paired.weight[i] @ x_TH[t] + router.paired.bias[i])
            scores[t, i] = math.log(float(row[i])) + head - math.log(norm)
    return dense.weights_TE.detach(), scores


def middle(scores):
    """A threshold between the two middle scores, so that rounding decides nothing."""
    ordered = scores[~scores.isnan()].sort().values
    half = len(ordered) // 2
    return float((ordered[half - 1] + ordered[half]) / 2)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_picks_below_the_threshold_go_to_their_zero_expert_and_the_others_keep_their_weight(kind):
    router = make(overrides=SIGMOID if kind == "sigmoid" else {})
    hidden, residual = tiny.hidden_states(), tiny.hidden_states(seed=5) * 3
    weights, scores = definition(router, hidden, residual, kind, 1.8 if kind == "sigmoid" else 1.0)
    theta = middle(scores)
    set_thresholds(router, [theta])
    probs, kept = route(router.eval(), hidden, residual)
    expected = (~scores.isnan()) & (scores >= theta)
    assert torch.equal(kept, expected)
    assert 0 < expected.sum() < len(weights) * K
    tiny.close(probs, weights * expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("score", ["weight", "head", "weight+head"])
def test_a_score_has_the_terms_it_names(score):
    router = make(score).eval()
    hidden = tiny.hidden_states()
    weights, full = definition(router, hidden, torch.ones_like(hidden))
    x_TH = hidden.detach().reshape(-1, hidden.shape[-1])
    expected = torch.zeros_like(full)
    if "weight" in score:
        expected = expected + weights.log()
    if "head" in score:
        expected = expected + x_TH @ router.paired.weight.detach().t() + router.paired.bias.detach()
    picked = ~full.isnan()
    theta = middle(expected[picked])
    set_thresholds(router, [theta])
    _, kept = route(router, hidden)
    assert torch.equal(kept, picked & (expected >= theta))


def test_masked_student_is_the_teacher_and_so_is_a_fresh_head():
    arch, config = tiny.architecture(), tiny.megatron_config()
    static, paired = (build_gpt_model(arch, config, zero).eval() for zero in (ZeroExpertConfig(), PAIRED))
    tiny.draw(static)
    paired.load_state_dict(static.state_dict(), strict=False)
    tokens = torch.randint(0, 96, (1, 12), generator=torch.Generator().manual_seed(3))
    arguments = (tokens, torch.arange(12)[None], None)
    with torch.no_grad():
        expected = static(*arguments)
        assert torch.equal(paired(*arguments), expected)
        assert all(float(module.threshold) == KEEP_ALL for module in paired_modules(paired))
        set_thresholds(paired, [0.0])
        assert not torch.equal(paired(*arguments), expected)
        set_dials(paired, zero_mask=True)
        assert torch.equal(paired(*arguments), expected)


def test_the_layer_sees_the_norm_of_its_own_residual_stream():
    model = build_gpt_model(tiny.architecture(), tiny.megatron_config(), PAIRED).eval()
    tiny.draw(model)
    seen, fed = [], []
    for layer in model.decoder.layers:
        layer.pre_mlp_layernorm.register_forward_hook(lambda _m, args, _o: fed.append(args[0].norm(dim=-1)))
        stock = layer.mlp.router.paired._residual_norm
        layer.mlp.router.paired._residual_norm = lambda t, f=stock: seen.append(f(t)) or seen[-1]
    with torch.no_grad():
        model(torch.arange(10)[None], torch.arange(10)[None], None)
    assert len(seen) == len(fed) == 2
    for one, other in zip(seen, fed):
        torch.testing.assert_close(one, other.reshape(-1))


@pytest.mark.parametrize("zero", [PAIRED, AWAKE], ids=["silent", "awake"])
@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputation_changes_no_gradient_with_micro_batches_in_flight(granularity, zero):
    """Two forward passes before the two backward ones, as in a pipeline."""
    changes = {"recompute_granularity": granularity}
    changes |= (
        {"recompute_method": "uniform", "recompute_num_layers": 1}
        if granularity == "full"
        else {"recompute_modules": ["moe"]}
    )
    gradients = []
    for overrides in ({}, changes):
        model = build_gpt_model(tiny.architecture(), tiny.megatron_config(overrides), zero).train()
        tiny.draw(model)
        set_thresholds(model, [-3.0])
        generator = torch.Generator().manual_seed(4)
        for _ in range(2):
            batches = [torch.randint(0, 96, (1, 9), generator=generator) for _ in range(2)]
            losses = [model(b, torch.arange(9)[None], None).float().square().mean() for b in batches]
            for loss in losses:
                loss.backward()
        assert 0 < collect(model, 2, torch.device("cpu")).zero_share < 1
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        tiny.close(gradients[1][name], expected, atol=1e-6, rtol=1e-5, msg=name)


def test_a_head_that_trains_computes_all_picks_and_gets_the_straight_through_gradient():
    router = make(threshold=0.0).train()
    hidden, residual = tiny.hidden_states(), tiny.hidden_states(seed=5)
    _, scores = definition(router, hidden, residual)
    set_thresholds(router, [middle(scores)])
    probs, dispatched = route(router, hidden, residual)
    assert torch.equal(dispatched, ~scores.isnan())
    weights, _ = definition(router, hidden, residual)
    hard = (scores >= router.paired.threshold).float()
    tiny.close(probs, weights * hard, atol=1e-6, rtol=1e-5)
    factor = torch.randn(probs.shape, generator=torch.Generator().manual_seed(8))
    got = torch.autograd.grad((probs * factor).sum(), router.paired.bias)[0]
    gate = (scores - router.paired.threshold).sigmoid().nan_to_num()
    tiny.close(got, (factor * weights * gate * (1 - gate)).sum(0), atol=1e-5, rtol=1e-4)
    assert collect(router, 1, torch.device("cpu")).zero_share == pytest.approx(
        float(1 - hard.sum() / (len(hard) * K))
    )


def test_a_frozen_head_dispatches_kept_picks_only_and_gets_no_gradient():
    router = make(threshold=0.0).train()
    router.paired.requires_grad_(False)
    hidden, residual = tiny.hidden_states(), tiny.hidden_states(seed=5)
    _, scores = definition(router, hidden, residual)
    set_thresholds(router, [middle(scores)])
    probs, dispatched = route(router, hidden, residual)
    assert torch.equal(dispatched, (scores >= router.paired.threshold) & ~scores.isnan())
    probs.sum().backward()
    assert router.paired.weight.grad is None
    assert router.weight.grad.abs().sum() > 0


def test_sparsity_loss_is_the_mean_gate_over_picks_that_are_no_padding():
    router = make("head", threshold=0.0).train()
    set_dials(router, sparsity_coeff=0.7)
    hidden = tiny.hidden_states()
    padding = torch.zeros(13, 1, dtype=torch.bool)
    padding[9:] = True
    probs, picked = route(router, hidden, padding=padding)
    (probs * 0).sum().backward()
    x_TH = hidden.detach().reshape(13, -1)
    head = (x_TH @ router.paired.weight.t() + router.paired.bias).detach().requires_grad_()
    rows = picked & ~padding.reshape(-1, 1)
    expected = torch.autograd.grad(0.7 * head.sigmoid()[rows].mean(), head)[0]
    tiny.close(router.paired.bias.grad, expected.sum(0), atol=1e-6, rtol=1e-5)


def test_scores_are_counted_without_padding():
    router = make("weight").eval()
    padding = torch.zeros(13, 1, dtype=torch.bool)
    padding[:5] = True
    reset(router)
    route(router, tiny.hidden_states(), padding=padding)
    report = collect(router, 1, torch.device("cpu"))
    assert report.score_counts.sum() == 8 * K


def test_no_cast_rounds_the_threshold():
    router = make()
    set_thresholds(router, [-2.3456789])
    exact = router.paired.threshold.clone()
    assert torch.equal(router.bfloat16().paired.threshold, exact)
    assert router.paired.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_zero_experts": 5}, "one zero expert per real one"),
        ({"zero_experts_type": "copy"}, "--zero-experts-type copy"),
        ({"paired_score": "weight+height"}, "--paired-score"),
        ({"paired_score": "weight+weight"}, "--paired-score"),
        ({"paired_temperature": 0.0}, "--paired-temperature"),
        ({"group_loss_coeff": 0.1}, "--target-zero-share"),
        ({"zero_expert_routing": "pared"}, "--zero-expert-routing"),
    ],
)
def test_settings_that_cannot_work_are_named(change, message):
    zero = ZeroExpertConfig(**({"num_zero_experts": N, "zero_expert_routing": "paired"} | change))
    with pytest.raises(UserError, match=message):
        zero.validate(N, K)


def test_replayed_picks_are_weighed_like_routed_ones():
    """Routing replay fixes the picks; which of them go to their zero expert follows from the scores again."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    router = make(overrides={"moe_enable_routing_replay": True}).eval()
    hidden, residual = tiny.hidden_states(), tiny.hidden_states(seed=5)
    _, scores = definition(router, hidden, residual)
    set_thresholds(router, [middle(scores)])
    try:
        router.router_replay.set_router_replay_action(RouterReplayAction.RECORD)
        probs, kept = route(router, hidden, residual)
        picks = router.router_replay.get_recorded_indices()
        assert torch.equal(torch.zeros_like(kept).scatter(1, picks, True), ~scores.isnan())
        with torch.no_grad():
            router.weight.add_(torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(1)))
        router.router_replay.set_target_indices(picks)
        router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        other_probs, other = route(router, hidden, residual)
    finally:
        RouterReplay.clear_global_router_replay_instances()
    assert not torch.equal(other_probs, probs)
    assert not (other & scores.isnan()).any() and 0 < other.sum() < picks.numel()
    x_TH = hidden.detach().reshape(13, -1)
    for t in range(13):
        logits = (x_TH[t] @ router.weight.t()).detach()[picks[t]].softmax(0)
        head = (router.paired.weight[picks[t]] @ x_TH[t] + router.paired.bias[picks[t]]).detach()
        score = logits.log() + head - residual.detach().reshape(13, -1)[t].norm().log()
        assert torch.equal(other[t][picks[t]], score >= router.paired.threshold)
