"""The rows that a fit sees, against experts run by hand."""

import math

import pytest
import tiny
import torch

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.fit.paired_fit import Sensitivity, moe_layers, watch_effects, watch_experts
from zeda_megatron.models.build import build_gpt_model
from zeda_megatron.moe.router_dials import set_dials

N, H = tiny.TINY["num_experts"], tiny.TINY["hidden_size"]


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_rows_are_the_inputs_and_log_norms_of_the_routed_experts_without_padding(backend):
    layer = tiny.moe_layer(ZeroExpertConfig(N, zero_expert_routing="paired"), backend=backend).eval()
    set_dials(layer, zero_mask=True)
    hidden = tiny.hidden_states()
    padding = torch.zeros(1, 13, dtype=torch.bool)
    padding[0, 10:] = True
    seen = []
    with torch.no_grad(), watch_experts(moe_layers(layer), {1: lambda *row: seen.append(row)}):
        layer(hidden, padding_mask=padding)
        layer(hidden)
    assert moe_layers(layer)[1] is layer
    x_TH = hidden.detach().reshape(13, H)
    routed = tiny.dense_routing(x_TH @ layer.router.weight.t(), 3, N)
    for (x, y, expert), tokens in zip(seen, (10, 13)):
        expected = []
        for e, (fc1, fc2) in enumerate(tiny.expert_weights(layer)):
            for t in range(tokens):
                if routed.map_TE[t, e]:
                    out = tiny.dense_experts(x_TH[t : t + 1], torch.ones(1, 1), [(fc1, fc2)])
                    expected.append((e, t, float(out.norm().log())))
        assert len(y) == len(expected) == tokens * 3
        assert expert.tolist() == [e for e, _, _ in expected]
        torch.testing.assert_close(x, x_TH[[t for _, t, _ in expected]])
        tiny.close(y, torch.tensor([v for _, _, v in expected]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("floor", [0.0, 0.7])
def test_effects_are_the_change_of_the_loss_along_each_output_with_a_floor(floor):
    layer = tiny.moe_layer(ZeroExpertConfig(N, zero_expert_routing="paired")).eval()
    set_dials(layer, zero_mask=True)
    hidden, seen, found = tiny.hidden_states(), [], {1: Sensitivity()}
    coefficients = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(6))
    with watch_effects(moe_layers(layer), {1: lambda *row: seen.append(row)}, {1: floor}, found):
        (layer(hidden)[0] * coefficients).sum().backward()
    (rows,) = seen
    x_TH, g_TH = hidden.detach().reshape(13, H), coefficients.reshape(13, H)
    routed = tiny.dense_routing(x_TH @ layer.router.weight.t(), 3, N)
    expected, effects, sizes = [], 0.0, 0.0
    for e, pair in enumerate(tiny.expert_weights(layer)):
        for t in range(13):
            if routed.map_TE[t, e]:
                out = tiny.dense_experts(x_TH[t : t + 1], torch.ones(1, 1), [pair])[0].detach()
                z, size, weight = float(g_TH[t] @ out), float(out.norm()), float(routed.weights_TE[t, e])
                expected.append(math.log(math.hypot(z, floor * size)))
                effects += (weight * z) ** 2
                sizes += (weight * size) ** 2
    tiny.close(rows[1], torch.tensor(expected), atol=1e-4, rtol=1e-4)
    assert found[1].ratio() == pytest.approx((effects / sizes) ** 0.5, rel=1e-4)


def test_the_mean_squared_effect_is_twice_the_divergence_when_a_pick_shrinks():
    """The claim behind `effect`: Fisher information along a pick, over all answers that the model may give."""
    config = tiny.megatron_config({"moe_router_dtype": "fp64"})
    model = build_gpt_model(tiny.architecture(), config, ZeroExpertConfig(), expert_backend="loop")
    model.double().eval()
    tiny.draw(model, std=0.15)
    arguments = (torch.arange(6)[None], torch.arange(6)[None], None)
    experts, shrink = model.decoder.layers[0].mlp.experts, 1e-3
    weights = []
    experts.register_forward_hook(lambda _m, args, output: weights.append((args[2], output[0])))
    logits = model(*arguments)[0, -1].log_softmax(0)
    out_RH = weights[0][1]
    gradients = [torch.autograd.grad(value, out_RH, retain_graph=True)[0] for value in logits]
    squares_R = sum(p * (g * out_RH).sum(1) ** 2 for p, g in zip(logits.exp(), gradients)).detach()
    row = int(squares_R.argmax())

    def smaller(_experts, _args, output):
        changed = output[0].clone()
        changed[row] *= 1 - shrink
        return changed, output[1]

    handle = experts.register_forward_hook(smaller)
    with torch.no_grad():
        other = model(*arguments)[0, -1].log_softmax(0)
    handle.remove()
    divergence = float((logits.exp() * (logits - other)).sum())
    assert 2 * divergence / shrink**2 == pytest.approx(float(squares_R[row]), rel=0.02)


def test_nothing_watches_when_the_fit_is_over():
    layer = tiny.moe_layer(ZeroExpertConfig(N, zero_expert_routing="paired"))
    with watch_experts(moe_layers(layer), {1: lambda *row: None}):
        assert layer.experts._forward_hooks and layer.router._forward_hooks
    assert not layer.experts._forward_hooks and not layer.router._forward_hooks
