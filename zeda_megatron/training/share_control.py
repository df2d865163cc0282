"""What holds the zero share of paired zero experts at its target while the model adapts."""

from __future__ import annotations

import random
from typing import Any

import torch

from ..moe.paired import KEEP_ALL, paired_modules, set_threshold
from ..moe.stats import StatsReport
from ..moe.threshold import ScoreQuantiles
from .options import Options

OPEN = -0.5
"""Threshold of a fresh mask that learns to close: with U = 0 and c = 0 every pick is half a unit inside."""


class ShareControl:
    """Leaves everything as it is; the base of the others."""

    def before_step(self, step: int) -> None:
        """Set what the next step trains with. `step` counts from 0."""

    def after_step(self, report: StatsReport) -> dict[str, float]:
        """Learn from the step's statistics; returns what is worth logging."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; equal on all ranks."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take that back."""


class ThresholdControl(ShareControl):
    """Each step's threshold is the quantile of recent scores at the target share.

    With a range, each step draws its own target from it (from the seed and the step alone, so a resumed run draws
    the same): the model learns to serve at any share.
    """

    def __init__(self, chunks: list[torch.nn.Module], target: float, bounds: tuple | None, seed: int):
        self.chunks, self.target, self.bounds, self.seed = chunks, target, bounds, seed
        self.quantiles = ScoreQuantiles()

    def before_step(self, step: int) -> None:
        target = self.target
        if self.bounds:
            target = random.Random(f"{self.seed}:{step}").uniform(*self.bounds)
        threshold = self.quantiles.threshold(target)
        if threshold is not None:  # the first step keeps the checkpoint's
            set_threshold(self.chunks, threshold)

    def after_step(self, report: StatsReport) -> dict[str, float]:
        self.quantiles.observe(report.score_counts)
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"score_counts": self.quantiles.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.quantiles.counts = state["score_counts"]


class SparsityControl(ShareControl):
    """The threshold stands; the coefficient of the sparsity loss follows the share (a BEAM-like mask router).

    A proportional-integral controller, never below 0, whose target rises from 0 over the first steps.
    """

    def __init__(self, chunks: list[torch.nn.Module], target: float, ramp_steps: int, gain: float):
        self.chunks, self.target, self.ramp_steps, self.gain = chunks, target, max(ramp_steps, 1), gain
        self.step, self.integral, self.share = 0, 0.0, 0.0
        for paired in paired_modules(chunks):
            if float(paired.threshold) == KEEP_ALL:
                paired.threshold.fill_(OPEN)

    def before_step(self, step: int) -> None:
        target = self.target * min(1.0, (step + 1) / self.ramp_steps)
        error = target - self.share
        self.integral = max(0.0, self.integral + 0.1 * self.gain * error)
        for paired in paired_modules(self.chunks):
            paired.sparsity_coeff = max(0.0, self.gain * error + self.integral)

    def after_step(self, report: StatsReport) -> dict[str, float]:
        self.share = report.zero_share
        modules = paired_modules(self.chunks)
        return {"sparsity_coeff": modules[0].sparsity_coeff} if modules else {}

    def state_dict(self) -> dict[str, Any]:
        return {"integral": self.integral, "share": self.share}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.integral, self.share = state["integral"], state["share"]


def build_share_control(options: Options, chunks: list[torch.nn.Module], paired: bool) -> ShareControl:
    """The control that the options ask for; one that does nothing for shared routing."""
    wanted = options.paired
    if not paired or wanted.paired_control == "none":
        return ShareControl()
    if wanted.paired_control == "sparsity":
        ramp = round(wanted.sparsity_ramp_fraction * options.optimizer.train_iters)
        return SparsityControl(chunks, wanted.target_zero_share, ramp, wanted.sparsity_gain)
    return ThresholdControl(chunks, wanted.target_zero_share, wanted.bounds(), options.optimizer.seed)
