"""The threshold of paired zero experts: a quantile of recent scores, held at the wanted zero share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..runtime.process_groups import device
from . import stats
from .router_dials import set_thresholds
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


def thresholds(counts: torch.Tensor, share: float) -> list[float | None]:
    """One quantile per row of histograms [rows, SCORE_BINS]; None where a row has counted nothing."""
    return [quantile(row, share) if row.any() else None for row in counts]


class ScoreQuantiles:
    """A running histogram of scores that old steps fade out of; any share can be asked of it.

    Scores drift slowly while a model adapts, so a quantile of the last ten steps or so is as good a controller as
    a tuned feedback loop, follows a target that changes at every step, and leaves no offset. One histogram for the
    whole model (`rows` 1) or one per layer.
    """

    def __init__(self, rows: int = 1, fade: float = 0.9):
        self.fade = fade
        self.counts = torch.zeros(rows, SCORE_BINS, dtype=torch.float64)

    def observe(self, counts: torch.Tensor | None) -> None:
        """Add one step's histograms [rows, SCORE_BINS] (over all ranks)."""
        if counts is not None:
            self.counts = self.fade * self.counts + counts

    def thresholds(self, share: float) -> list[float | None] | None:
        """The thresholds for this zero share; None before anything was observed."""
        return thresholds(self.counts, share) if self.counts.any() else None


def calibrate_threshold(
    model_chunks,
    rows: Iterable[Any],
    share: float,
    forward: Callable[[Any, Any], Any],
    passes: int = 4,
    by_layer: bool = False,
) -> list[float | None]:
    """Set the threshold so that `share` of the picks on these rows go to zero experts; returns it in a list.

    With `by_layer` every layer skips that share of its own picks; the list then has one threshold per decoder layer
    (None for layers without experts). Scores of a layer depend on what the layers below skipped, so the quantile is
    taken again under the new threshold, a few times. All processes call it, each with its own rows.

    Args:
        forward: `forward(model_chunks, row)` runs the model; called in evaluation mode, without gradients.
    """
    chunks = model_chunks if isinstance(model_chunks, (list, tuple)) else [model_chunks]
    layers, values = chunks[0].config.num_layers, []
    with stats.evaluating(chunks), torch.no_grad():
        for _ in range(passes):
            for row in rows:
                forward(model_chunks, row)
            counts = stats.collect(chunks, layers, device(), scores_by_layer=by_layer).score_counts
            if counts is None:
                raise RuntimeError(
                    "no scores were counted: the model has no paired zero experts, or they are masked"
                )
            values = thresholds(counts, share)
            set_thresholds(chunks, values)
    return values


def format_thresholds(values: list[float | None]) -> str:
    """`-3.1416`, or one number per layer with experts."""
    return " ".join(f"{value:.4f}" for value in values if value is not None)
