"""The threshold is the quantile of recent scores."""

import pytest
import tiny
import torch

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.moe.router_dials import zero_mask
from zeda_megatron.moe.stats import SCORE_BINS, RoutingStats, routers
from zeda_megatron.moe.threshold import ScoreQuantiles, calibrate_threshold, quantile, thresholds


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
