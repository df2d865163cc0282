"""Controls of paired zero experts: their threshold, or the sparsity loss of their head."""

from __future__ import annotations

import random
from typing import Any

import torch

from ..errors import UserError
from ..moe.paired import paired_modules
from ..moe.router_dials import open_thresholds, set_dials, set_thresholds
from ..moe.stats import SCORE_BINS, StatsReport
from ..moe.threshold import ScoreQuantiles
from .share_control import ShareControl


class ThresholdControl(ShareControl):
    """Each step's threshold is the quantile of recent scores at the target share; of each layer's own scores where
    the statistics come per layer.

    With a range, each step draws its own target from it (from the seed and the step alone, so a resumed run draws
    the same): the model learns to serve at any share.
    """

    def __init__(
        self,
        chunks: list[torch.nn.Module],
        target: float,
        bounds: tuple | None,
        seed: int,
        by_layer: bool = False,
    ):
        self.chunks, self.target, self.bounds, self.seed = chunks, target, bounds, seed
        self.quantiles = ScoreQuantiles(chunks[0].config.num_layers if by_layer else 1)

    def before_step(self, step: int) -> None:
        target = self.target
        if self.bounds:
            target = random.Random(f"{self.seed}:{step}").uniform(*self.bounds)
        found = self.quantiles.thresholds(target)
        if found is not None:  # the first step keeps the checkpoint's
            set_thresholds(self.chunks, found)

    def after_step(self, report: StatsReport) -> dict[str, float]:
        self.quantiles.observe(report.score_counts)
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"score_counts": self.quantiles.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        counts = state["score_counts"].view(-1, SCORE_BINS)
        if len(counts) == len(self.quantiles.counts):
            self.quantiles.counts = counts
        elif counts.any():
            was = "model" if len(counts) == 1 else "layer"
            raise UserError(
                f"--paired-budget: the checkpoint was trained with {was}; resume with that, or start in a new "
                "--save folder"
            )


class SparsityControl(ShareControl):
    """The threshold stands; the coefficient of the sparsity loss follows the share (a BEAM-like mask router).

    A proportional-integral controller, never below 0, whose target rises from 0 over the first steps.
    """

    def __init__(self, chunks: list[torch.nn.Module], target: float, ramp_steps: int, gain: float):
        self.chunks, self.target, self.ramp_steps, self.gain = chunks, target, max(ramp_steps, 1), gain
        self.integral, self.share, self.coeff = 0.0, 0.0, 0.0
        open_thresholds(chunks)

    def before_step(self, step: int) -> None:
        target = self.target * min(1.0, (step + 1) / self.ramp_steps)
        error = target - self.share
        self.integral = max(0.0, self.integral + 0.1 * self.gain * error)
        self.coeff = max(0.0, self.gain * error + self.integral)
        set_dials(self.chunks, sparsity_coeff=self.coeff)

    def after_step(self, report: StatsReport) -> dict[str, float]:
        self.share = report.zero_share
        return {"sparsity_coeff": self.coeff} if paired_modules(self.chunks) else {}

    def state_dict(self) -> dict[str, Any]:
        return {"integral": self.integral, "share": self.share}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.integral, self.share = state["integral"], state["share"]
