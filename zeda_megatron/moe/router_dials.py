"""The dials of the routers: all that may be turned on a model that is already built, set here and nowhere else.

And the threshold of paired zero experts: a quantile of recent scores, held at the wanted zero share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..config.zero_experts import ZeroExpertConfig
from ..runtime.process_groups import device
from . import stats
from .paired import KEEP_ALL, paired_modules
from .pick_rules import PickRule
from .stats import SCORE_BINS, SCORE_RANGE, decoder_routers, layer_of, routers

OPEN = -0.5
"""Threshold of a fresh mask that learns to close: with U = 0 and c = 0 every pick is half a unit inside."""


@dataclass(frozen=True)
class RouterDials:
    """What a router does beyond its weights."""

    zero_mask: bool = False
    """Route over the N real experts only; the layer is then bit-equal to the static one."""
    pick_rule: PickRule | None = None
    """Thins out the picks (baselines)."""
    zero_logit_bias: float = 0.0
    """Added to the logits of shared zero experts: the compute dial at inference."""
    zero_weight: float = ZeroExpertConfig.moe_zero_expert_weight
    """w of the group loss; a share control may move it."""
    sparsity_coeff: float = 0.0
    """Coefficient of the mean gate of paired zero experts as an extra loss (BEAM's regulariser); 0 adds none."""
    loss_factor: float = 1.0
    """Multiplies the losses that the router attaches; above 1 where some micro-batches are padding alone."""


def set_dials(model_chunks, **values) -> None:
    """Give the routers of all layers these values (fields of `RouterDials`)."""
    for router in routers(model_chunks):
        router.dials = replace(router.dials, **values)


def has_pick_rule(model_chunks) -> bool:
    """A rule thins out the picks of some layer."""
    return any(router.dials.pick_rule is not None for router in routers(model_chunks))


@contextmanager
def dialled(model_chunks, **values) -> Iterator[None]:
    """`with dialled(model, zero_weight=3.0): ...`; the dials are as before afterwards, whatever happens inside."""
    before = [(router, router.dials) for router in routers(model_chunks)]
    set_dials(model_chunks, **values)
    try:
        yield
    finally:
        for router, dials in before:
            router.dials = dials


def zero_mask(model_chunks):
    """`with zero_mask(model): ...` runs the static model inside a dynamic one."""
    return dialled(model_chunks, zero_mask=True, pick_rule=None)


def set_thresholds(model_chunks, values: list[float | None]) -> None:
    """Give the paired zero experts of all layers one threshold (a list of one), or each its own (one per decoder layer,
    None leaves it). Thresholds are part of the weights: checkpoints keep them. A multi-token-prediction head keeps its
    own."""
    for router in decoder_routers(model_chunks):
        value = values[0 if len(values) == 1 else layer_of(router)]
        if router.paired is not None and value is not None:
            router.paired.threshold.fill_(value)


def open_thresholds(model_chunks) -> None:
    """Let fresh masks, whose threshold keeps every pick, begin to learn: `OPEN`."""
    for paired in paired_modules(model_chunks):
        if float(paired.threshold) == KEEP_ALL:
            paired.threshold.fill_(OPEN)


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
