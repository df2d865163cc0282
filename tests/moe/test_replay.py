"""Routing replay: recorded picks are taken again, weighed by the router's scores of now."""

import pytest
import tiny
import torch

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.errors import UserError
from zeda_megatron.moe.replay import RoutingReplay, enable_replay, recorded_picks, recording, set_targets
from zeda_megatron.moe.router_dials import zero_mask
from zeda_megatron.moe.stats import routers

pytestmark = pytest.mark.usefixtures("one_process")
ZERO = ZeroExpertConfig(4)


@pytest.fixture
def router():
    return tiny.router(ZERO)


def route(router, hidden):
    probs, routing_map = router(hidden)
    return probs, routing_map


def picks_of(router, hidden):
    replay = router.router_replay = RoutingReplay(router.num_real, recompute=False)
    replay.recording = True
    router(hidden)
    replay.recording = False
    return replay.recorded_TK.clone()


def test_replayed_picks_get_the_weights_of_the_scores_of_now(router):
    hidden = tiny.hidden_states()
    picks_TK = picks_of(router, hidden)
    assert int(picks_TK.max()) >= 8  # zero experts among them
    with torch.no_grad():
        router.weight.add_(torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(1)))
    free_probs, free_map = route(router, hidden)
    router.router_replay.target_TK = picks_TK
    probs, routing_map = route(router, hidden)
    assert not torch.equal(free_map, routing_map)
    logits_TE = (hidden.reshape(13, -1) @ router.weight.t()).detach()
    for t in range(13):
        weights = logits_TE[t, picks_TK[t]].softmax(0)
        wanted = torch.zeros(12).scatter(0, picks_TK[t], weights)[:8]
        torch.testing.assert_close(probs[t].detach(), wanted)
        assert set(routing_map[t].nonzero().flatten().tolist()) == {p for p in picks_TK[t].tolist() if p < 8}
    router.router_replay.target_TK = None
    assert torch.equal(route(router, hidden)[0], free_probs)


def test_replaying_what_would_be_picked_anyway_changes_no_bit(router):
    hidden = tiny.hidden_states()
    free = route(router, hidden)
    picks = picks_of(router, hidden)
    router.router_replay.target_TK = picks
    assert all(torch.equal(a, b) for a, b in zip(route(router, hidden), free, strict=True))


def test_open_picks_are_the_routers(router):
    hidden = tiny.hidden_states()
    free_probs, _ = route(router, hidden)
    picks = picks_of(router, hidden)
    shifted = (picks + 1) % 12
    shifted[::2] = -1
    router.router_replay.target_TK = shifted
    probs, _ = route(router, hidden)
    assert torch.equal(probs[::2], free_probs[::2]) and not torch.equal(probs[1::2], free_probs[1::2])


def test_the_masked_router_is_never_replayed(router):
    """It is the teacher."""
    hidden = tiny.hidden_states()
    with zero_mask(router):
        free = route(router, hidden)
    router.router_replay = RoutingReplay(router.num_real, recompute=False)
    router.router_replay.target_TK = torch.full((13, 3), 11)
    with zero_mask(router):
        assert all(torch.equal(a, b) for a, b in zip(route(router, hidden), free, strict=True))


def test_gradients_flow_through_replayed_weights(router):
    hidden = tiny.hidden_states()
    picks = picks_of(router, hidden)
    router.router_replay.target_TK = (picks + 1) % 12
    probs, _ = route(router, hidden)
    (probs * torch.arange(8.0)).sum().backward()
    assert float(router.weight.grad.abs().max()) > 0


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputation_takes_the_picks_of_its_own_micro_batch(granularity):
    """Two forward passes, then two backward passes: as in a pipeline."""
    hf = tiny.hf_model()
    overrides = {"recompute_granularity": granularity}
    if granularity == "full":
        overrides |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    else:
        overrides |= {"recompute_modules": ["moe"]}
    tokens = [torch.randint(0, 96, (1, 12), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    positions = torch.arange(12)[None]
    draw = torch.Generator().manual_seed(5)
    targets = [
        torch.stack([torch.randperm(12, generator=draw)[:3] for _ in range(24)]).view(12, 2, 3)
        for _ in range(2)
    ]
    found = []
    for changes in ({}, overrides):
        model = tiny.megatron_model(hf, ZERO, overrides=changes).train()
        enable_replay(model)
        losses = []
        for token, target in zip(tokens, targets, strict=True):
            set_targets(model, target)
            losses.append(model(token, positions, None).logsumexp(-1).sum())
        for loss in losses:
            loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    plain, recomputed = found
    for name, gradient in plain.items():
        tiny.close(recomputed[name], gradient, rtol=1e-4, atol=1e-5)


def test_the_picks_of_a_model_can_be_recorded_and_taken_again():
    model = tiny.megatron_model(tiny.hf_model(), ZERO)
    tokens, positions = torch.arange(10)[None], torch.arange(10)[None]
    with torch.no_grad(), recording(model):
        logits = model(tokens, positions, None)
        picks_TLK = recorded_picks([model], tokens=10)
    assert picks_TLK.dtype == torch.int16 and picks_TLK.shape == (10, 2, 3)
    assert all(router.router_replay is None for router in routers(model))
    enable_replay(model)
    set_targets(model, picks_TLK)
    with torch.no_grad():
        assert torch.equal(model(tokens, positions, None), logits)
        set_targets(model, (picks_TLK + 1) % 12)
        assert not torch.equal(model(tokens, positions, None), logits)


def test_picks_of_another_row_are_refused(router):
    router.router_replay = RoutingReplay(router.num_real, recompute=False)
    router.router_replay.target_TK = torch.zeros(5, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\(5, 3\).*\(13, 3\)"):
        route(router, tiny.hidden_states())


def test_a_model_without_our_routers_is_named():
    with pytest.raises(UserError, match=r"--routing-replay.*--moe-router-load-balancing-type none"):
        enable_replay(tiny.megatron_model(tiny.hf_model()))


def test_a_pipeline_stage_without_experts_has_nothing_to_replay():
    stage = tiny.megatron_model(tiny.hf_model(mlp_only_layers=[0]), ZERO)
    stage.decoder.layers = stage.decoder.layers[:1]
    enable_replay(stage)
    with recording(stage):
        assert (recorded_picks([stage], tokens=4) == -1).all()
    set_targets(stage, torch.zeros(4, 2, 3, dtype=torch.int16))
