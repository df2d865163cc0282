"""Roofline predictions against simulation, hand calculation and the speed the paper measured."""

from pathlib import Path

import pytest
import torch

from zeda_megatron.planning.cost_sheet import (
    GPUS,
    Gpu,
    decode_seconds,
    distinct_experts,
    gpu,
    predict,
    prefill_seconds,
)
from zeda_megatron.planning.flops import Geometry

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QWEN = Geometry.read(EXAMPLES / "qwen3_30b_a3b")
GLM = Geometry.read(EXAMPLES / "glm_4_7_flash")


@pytest.mark.parametrize(("tokens", "zero_share"), [(1, 0.0), (8, 0.5), (32, 0.25), (64, 0.5)])
def test_distinct_experts_match_a_simulated_uniform_router(tokens, zero_share):
    generator = torch.Generator().manual_seed(1)
    hits = []
    for _ in range(300):
        picks_TK = torch.rand(tokens, QWEN.experts, generator=generator).topk(QWEN.topk).indices
        kept = picks_TK[torch.rand(tokens, QWEN.topk, generator=generator) >= zero_share]
        hits.append(kept.unique().numel())
    simulated = sum(hits) / len(hits)
    assert distinct_experts(QWEN, tokens, zero_share) == pytest.approx(simulated, rel=0.03, abs=0.15)


def test_one_decoded_token_reads_the_active_weights_once():
    device = Gpu("slow memory", flops=1e30, bandwidth=1e12, source="invented")
    parts = decode_seconds(QWEN, device, batch=1, context=1)
    # All matrices but the embedding (one row of it is read); norms and biases are not counted.
    norms = QWEN.hidden * (2 * QWEN.layers + 1) + QWEN.layers * QWEN.attention.norm
    weights = 2 * (QWEN.active_parameters() - norms - QWEN.hidden * QWEN.vocabulary)
    assert sum(parts.values()) * 1e12 == pytest.approx(weights, rel=2e-3)


def test_a_large_prefill_on_a_gpu_with_free_memory_is_its_flops():
    device = Gpu("free memory", flops=1e12, bandwidth=1e30, source="invented")
    parts = prefill_seconds(QWEN, device, tokens=8192, context=8192, zero_share=0.5, zero_rows=64)
    assert parts["routed_experts"] == pytest.approx(8192 * 2 * 48 * 4 * 3 * 2048 * 768 / 1e12)
    assert parts["attention_scores"] == pytest.approx(8192 * 2 * 48 * 2 * 4096 * 4096.5 / 1e12)
    assert parts["lm_head"] == pytest.approx(2 * 2048 * 151936 / 1e12)


@pytest.mark.parametrize("geometry", [QWEN, GLM], ids=["qwen", "glm"])
def test_speedup_vanishes_when_every_expert_is_read_anyway(geometry):
    small, large = predict(geometry, GPUS["h100"], 0.5, geometry.experts // 2, 4096, (8, 512), ())
    assert small.speedup > 1.5
    assert large.speedup == pytest.approx(1.0, abs=0.005)
    assert large.dynamic_experts == pytest.approx(geometry.experts, rel=0.001)


def test_prediction_at_the_papers_batch_is_near_and_not_below_the_measured_speedup():
    """Measured there: 1.25x to 1.19x (Qwen), 1.22x to 1.19x (GLM) in decoding, one H200, 32 at a time."""
    for geometry, zero_share, measured in ((QWEN, 0.512, 1.25), (GLM, 0.53, 1.22)):
        (line,) = predict(geometry, GPUS["h200"], zero_share, geometry.experts // 2, 2048, (32,), ())
        assert measured <= line.speedup < measured + 0.15


def test_given_rates_replace_those_of_the_datasheet():
    assert gpu("H100").flops == GPUS["h100"].flops
    half = gpu("h100", flops=400e12)
    assert (half.flops, half.bandwidth) == (400e12, GPUS["h100"].bandwidth)
    assert "by hand" in half.source
    assert gpu("my card", 1e14, 1e12).name == "my card"
