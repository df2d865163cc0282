"""What the operator allocates, counted by torch's allocator: bounded by the chunk, not by the tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from zeda_megatron.config.run import LOSS_KINDS
from zeda_megatron.ops.vocab_kl import LossInputs, fused_distill_loss, reference_distill_loss

HIDDEN, VOCAB, CHUNK = 8, 2000, 16


@dataclass(frozen=True)
class Allocations:
    largest: int
    """Floats in the largest single allocation."""
    peak: int
    """Most floats alive at once, inputs not counted."""


def allocations(operator, tokens: int, **options) -> Allocations:
    """Forward and backward of one call, every temporary inside torch's kernels included."""
    torch.manual_seed(0)
    hidden_TH = torch.randn(tokens, HIDDEN, requires_grad=True)
    weight_VH = torch.randn(VOCAB, HIDDEN, requires_grad=True)
    teacher = (torch.randn(tokens, HIDDEN), torch.randn(VOCAB, HIDDEN))
    labels_T, weights_T = torch.randint(0, VOCAB, (tokens,)), torch.ones(tokens)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        operator(LossInputs(hidden_TH, weight_VH, *teacher, labels_T, weights_T), **options)[0].backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = largest = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        largest, peak = max(largest, event.nbytes()), max(peak, alive)
    return Allocations(largest // 4, peak // 4)


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_memory_is_bound_by_the_chunk_not_by_tokens_times_vocabulary(kind):
    few, many = (
        allocations(fused_distill_loss, tokens, kind=kind, chunk_tokens=CHUNK) for tokens in (64, 256)
    )
    assert few.largest == many.largest == CHUNK * VOCAB
    # Per token only its hidden gradient (twice, during backward) and a few numbers.
    assert many.peak - few.peak <= (256 - 64) * (2 * HIDDEN + 16)
    logits_alive = 5 if kind == "jsd" else 4
    heads = 2 * VOCAB * HIDDEN
    assert many.peak <= logits_alive * CHUNK * VOCAB + heads + 256 * (2 * HIDDEN + 16)


def test_the_measurement_sees_full_logits_where_there_are_some():
    full = allocations(reference_distill_loss, 64, kind="forward_kl")
    assert full.largest == 64 * VOCAB and full.peak > 4 * 64 * VOCAB


def test_masked_tokens_cost_no_logits():
    def masked(inputs, **options):
        three = inputs.weights * (torch.arange(len(inputs.weights)) < 3)
        return fused_distill_loss(replace(inputs, weights=three), **options)

    seen = allocations(masked, 64, kind="forward_kl", chunk_tokens=1000)
    assert seen.largest <= max(3 * VOCAB, VOCAB * HIDDEN)
