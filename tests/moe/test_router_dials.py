"""The routers' dials: set through one door, and back on every path."""

import ast
from pathlib import Path

import pytest
import tiny
import torch

import zeda_megatron
from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.moe.pick_rules import StaticTopK
from zeda_megatron.moe.router_dials import (
    RouterDials,
    ScoreQuantiles,
    calibrate_threshold,
    dialled,
    quantile,
    set_dials,
    thresholds,
    zero_mask,
)
from zeda_megatron.moe.stats import SCORE_BINS, RoutingStats, evaluating, routers

N = tiny.TINY["num_experts"]


def model(count=2):
    """Routers of neighbouring layers; they learn."""
    zero = ZeroExpertConfig(4, group_loss_coeff=0.1, moe_zero_expert_weight=2.5)
    return torch.nn.ModuleList(tiny.router(zero, seed=i) for i in range(count)).train()


def test_all_layers_get_a_dial_and_keep_the_others():
    routers = model()
    set_dials(routers, pick_rule=StaticTopK(2))
    set_dials(routers, zero_weight=3.0)
    assert [r.dials for r in routers] == [RouterDials(pick_rule=StaticTopK(2), zero_weight=3.0)] * 2
    with pytest.raises(TypeError, match="zero_wait"):
        set_dials(routers, zero_wait=3.0)


def test_w_begins_as_the_config_says():
    assert [router.dials for router in model()] == [RouterDials(zero_weight=2.5)] * 2


def test_dials_mode_and_statistics_come_back_after_an_error():
    routers = model()
    set_dials(routers[0], pick_rule=StaticTopK(1))
    routers[1].eval()
    routers[0](tiny.hidden_states())
    before = [(r.dials, r.training, r.routing_stats) for r in routers]
    with pytest.raises(ValueError, match="x"), evaluating(list(routers)), zero_mask(routers):
        with dialled(routers, zero_logit_bias=1.0):
            assert routers[1].dials == RouterDials(zero_mask=True, zero_logit_bias=1.0, zero_weight=2.5)
        assert routers[1].dials.zero_logit_bias == 0.0
        assert not routers[0].training and routers[0].dials.pick_rule is None
        assert routers[0].routing_stats.slots is None
        routers[0](tiny.hidden_states())
        raise ValueError("x")
    after = [(r.dials, r.training, r.routing_stats) for r in routers]
    assert [x[:2] for x in after] == [x[:2] for x in before]
    assert all(mine is kept for (*_, mine), (*_, kept) in zip(after, before))


def test_no_other_file_reaches_for_the_dials():
    """They are set by `moe.router_dials` and read by the router; everything else asks there."""
    root = Path(zeda_megatron.__file__).parent
    users = {
        str(path.relative_to(root))
        for room in ("moe", "models", "distill", "fit", "training", "evaluation/quality")
        for path in (root / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "dials"
    }
    assert users == {"moe/router.py", "moe/router_dials.py"}


def histogram(scores):
    stats = RoutingStats()
    stats.add_scores(scores[:, None], torch.ones(len(scores), 1, dtype=torch.bool), None)
    return stats.score_counts


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.62, 0.75, 1.0])
def test_quantile_equals_torchs_own_within_a_bin(share):
    scores = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 2 - 3
    if share:  # at 0 any threshold below all scores is right
        expected = float(scores.quantile(share))
        assert quantile(histogram(scores), share) == pytest.approx(expected, abs=2 / 128)
    below = float((scores < quantile(histogram(scores), share)).float().mean())
    assert below == pytest.approx(share, abs=1e-3)


def test_scores_outside_the_range_count_at_its_ends():
    counts = histogram(torch.tensor([-1e3, -100.0, 0.0, 1e3]))
    assert counts[0] == 2 and counts[-1] == 1 and counts.sum() == 4 and len(counts) == SCORE_BINS


def test_old_steps_fade_so_the_threshold_follows_a_drift():
    quantiles = ScoreQuantiles()
    assert quantiles.thresholds(0.5) is None
    generator = torch.Generator().manual_seed(1)
    for step in range(60):
        quantiles.observe(histogram(torch.randn(2000, generator=generator) + 0.01 * step)[None])
    # the mean age of a step in the histogram is 9 steps
    assert quantiles.thresholds(0.5) == [pytest.approx(0.59 - 0.09, abs=0.03)]
    assert quantiles.thresholds(0.25) < quantiles.thresholds(0.5) < quantiles.thresholds(0.75)


def test_layers_may_have_thresholds_of_their_own_and_layers_without_experts_have_none():
    counts = torch.stack(
        [
            histogram(torch.linspace(-4, 0, 1000)),
            torch.zeros(SCORE_BINS),
            histogram(torch.linspace(2, 4, 1000)),
        ]
    )
    assert thresholds(counts, 0.5) == [pytest.approx(-2, abs=0.01), None, pytest.approx(3, abs=0.01)]


@pytest.mark.parametrize("fault", ["raises", "masked"])
@pytest.mark.usefixtures("one_process")
def test_a_calibration_that_fails_leaves_mode_and_statistics_as_they_were(fault):
    """In the middle of a pass, or since nothing was counted."""
    paired = ZeroExpertConfig(8, zero_expert_routing="paired", paired_score="weight+head")
    model = tiny.megatron_model(tiny.hf_model(), paired).train()
    before = [router.routing_stats for router in routers(model)]

    def forward(chunk, row):
        assert not chunk.training
        if fault == "raises":
            raise RuntimeError("no scores, no memory")
        with zero_mask(chunk):
            return chunk(torch.zeros(1, 4, dtype=torch.long), torch.arange(4)[None], None)

    with pytest.raises(RuntimeError, match="no scores"):
        calibrate_threshold(model, [0], 0.5, forward)
    assert model.training and all(
        router.routing_stats is kept for router, kept in zip(routers(model), before)
    )
