"""The threshold of paired zero experts: a quantile of recent scores, held at the wanted zero share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..runtime.process_groups import device
from . import stats
from .paired import set_threshold
from .stats import SCORE_BINS, SCORE_RANGE


def quantile(counts: torch.Tensor, share: float) -> float:
    """The score below which `share` of the picks lie. counts [SCORE_BINS], any type; linear inside a bin."""
    total = counts.double().cumsum(0)
    wanted = share * float(total[-1])
    place = int(torch.searchsorted(total, torch.tensor(wanted, dtype=torch.float64)))
    place = min(place, SCORE_BINS - 1)
    before = float(total[place - 1]) if place else 0.0
    inside = (wanted - before) / max(float(counts[place]), 1e-12)
    low, high = SCORE_RANGE
    return low + (place + min(max(inside, 0.0), 1.0)) * (high - low) / SCORE_BINS


class ScoreQuantiles:
    """A running histogram of scores that old steps fade out of; any share can be asked of it.

    Scores drift slowly while a model adapts, so a quantile of the last ten steps or so is as good a controller as
    a tuned feedback loop, follows a target that changes at every step, and leaves no offset.
    """

    def __init__(self, fade: float = 0.9):
        self.fade = fade
        self.counts = torch.zeros(SCORE_BINS, dtype=torch.float64)

    def observe(self, counts: torch.Tensor | None) -> None:
        """Add one step's histogram (over all layers and ranks)."""
        if counts is not None:
            self.counts = self.fade * self.counts + counts

    def threshold(self, share: float) -> float | None:
        """The threshold for this zero share; None before anything was observed."""
        return quantile(self.counts, share) if self.counts.any() else None


def calibrate_threshold(
    model_chunks,
    rows: Iterable[Any],
    share: float,
    forward: Callable[[Any, Any], Any],
    passes: int = 4,
) -> float:
    """Set the threshold so that `share` of the picks on these rows go to zero experts; returns it.

    Scores of a layer depend on what the layers below skipped, so the quantile is taken again under the new
    threshold, a few times. All processes call it, each with its own rows.

    Args:
        forward: `forward(model_chunks, row)` runs the model; called in evaluation mode, without gradients.
    """
    chunks = model_chunks if isinstance(model_chunks, (list, tuple)) else [model_chunks]
    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    layers = chunks[0].config.num_layers
    value, kept = 0.0, [(router, router.routing_stats) for router in stats.routers(chunks)]
    for router, _ in kept:
        router.routing_stats = stats.RoutingStats()
    for _ in range(passes):
        stats.reset(chunks)
        with torch.no_grad():
            for row in rows:
                forward(model_chunks, row)
        counts = stats.collect(chunks, layers, device()).score_counts
        if counts is None:
            raise RuntimeError(
                "no scores were counted: the model has no paired zero experts, or they are masked"
            )
        value = quantile(counts, share)
        set_threshold(chunks, value)
    for router, before in kept:
        router.routing_stats = before
    for chunk, was_training in zip(chunks, training):
        chunk.train(was_training)
    return value
