"""What holds the zero share while the model adapts: controls of w, of pick rules, of paired zero experts' threshold."""

from __future__ import annotations

import math
import random
from typing import Any

import torch

from ..config.options import Options
from ..errors import UserError
from ..moe.paired import paired_modules
from ..moe.pick_rules import StaticTopK
from ..moe.router_dials import (
    ScoreQuantiles,
    open_thresholds,
    set_dials,
    set_thresholds,
)
from ..moe.stats import SCORE_BINS, StatsReport
from .build import Student


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


class TopKControl(ShareControl):
    """Each step draws how many picks of every token stay (NET for many shares); from the seed and the step alone."""

    def __init__(self, chunks: list[torch.nn.Module], bounds: tuple[int, int], seed: int):
        self.chunks, self.bounds, self.seed = chunks, bounds, seed

    def before_step(self, step: int) -> None:
        topk = random.Random(f"{self.seed}:{step}").randint(*self.bounds)
        set_dials(self.chunks, pick_rule=StaticTopK(topk))


class WeightControl(ShareControl):
    """Shared zero experts: the weight w of the group loss follows the share.

    A proportional-integral controller on log w, around the w whose loss is least at the wanted share. The loss pulls
    the share towards w*Nz/(N+w*Nz), but other gradients pull back and a short run does not arrive. The wanted share
    goes from the first step's to the target over the first steps: pulled at once, the routing would tear.
    """

    LIMIT = 2.0
    """log w stays within this distance of the share's own w."""

    def __init__(
        self,
        chunks: list[torch.nn.Module],
        target: float,
        num_real: int,
        num_zero: int,
        ramp_steps: int,
        gain: float,
    ):
        self.chunks, self.target, self.gain, self.ramp_steps = chunks, target, gain, max(ramp_steps, 1)
        self.ratio = num_real / num_zero
        self.start: float | None = None
        self.share, self.integral, self.weight = target, 0.0, 0.0

    def before_step(self, step: int) -> None:
        start = self.target if self.start is None else self.start
        wanted = start + (self.target - start) * min(1.0, (step + 1) / self.ramp_steps)
        error = wanted - self.share
        if step >= self.ramp_steps:  # on the way the share lags behind: that is no lasting error
            self.integral = self._clamp(self.integral + 0.02 * self.gain * error)
        own = self.ratio * wanted / max(1 - wanted, 1e-3)
        self.weight = max(own * math.exp(self._clamp(self.gain * error + self.integral)), 1e-3)
        set_dials(self.chunks, zero_weight=self.weight)

    def _clamp(self, value: float) -> float:
        return min(max(value, -self.LIMIT), self.LIMIT)

    def after_step(self, report: StatsReport) -> dict[str, float]:
        self.share = report.zero_share
        if self.start is None:
            self.start = self.share
        return {"zero_weight": self.weight}

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start, "share": self.share, "integral": self.integral}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start, self.share, self.integral = state["start"], state["share"], state["integral"]


class ThresholdControl(ShareControl):
    """Each step's threshold is the quantile of recent scores at the target share; of each layer's own scores where
    the statistics come per layer.

    With a range, each step draws its own target from it (from the seed and the step alone, so a resumed run draws
    the same): the model learns to serve at any share. The threshold of a multi-token-prediction head stays what it is.
    """

    def __init__(
        self,
        chunks: list[torch.nn.Module],
        target: float,
        bounds: tuple | None,
        seed: int,
        by_layer: bool = False,
        of_decoder: bool = True,
    ):
        """`of_decoder`: off leaves the thresholds as they are."""
        self.chunks, self.target, self.bounds, self.seed = chunks, target, bounds, seed
        self.quantiles = ScoreQuantiles(chunks[0].config.num_layers if by_layer else 1)
        self.of_decoder = of_decoder

    def before_step(self, step: int) -> None:
        target = self.target
        if self.bounds:
            target = random.Random(f"{self.seed}:{step}").uniform(*self.bounds)
        found = self.quantiles.thresholds(target)
        if found is not None and self.of_decoder:  # the first step keeps the checkpoint's
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


def build_share_control(options: Options, student: Student) -> ShareControl:
    """The control that the options ask for; one that does nothing for shared zero experts with a fixed w.

    Raises `UserError` for a flag that this student has no use for.
    """
    wanted, chunks, zero = options.share, student.chunks, student.zero
    if wanted.topk_range:
        topk = chunks[0].config.moe_router_topk
        return TopKControl(chunks, wanted.topk_bounds(topk), options.optimizer.seed)
    if not zero.paired:
        for flag, value in (
            ("--zero-share-range", wanted.zero_share_range),
            ("--paired-head-lr", wanted.paired_head_lr),
            ("--paired-budget layer", wanted.paired_budget == "layer"),
        ):
            if value:
                raise UserError(f"{flag} is for paired zero experts; this model has none")
        if wanted.target_zero_share is None:
            return ShareControl()
        if not zero.group_loss_coeff or not wanted.target_zero_share > 0:
            raise UserError(
                f"--target-zero-share {wanted.target_zero_share}: shared zero experts are steered by the group loss; "
                "give a share above 0, --moe-router-load-balancing-type grouped_aux_loss and --moe-aux-loss-coeff"
            )
        if zero.group_loss_variant == "adamoe":
            raise UserError(
                f"--target-zero-share {wanted.target_zero_share}: --group-loss-variant adamoe has no weight that could "
                "be moved; choose routed or authors, or leave the share to --num-zero-experts"
            )
        real = chunks[0].config.num_moe_experts
        ramp = round(wanted.zero_share_ramp_fraction * options.optimizer.train_iters)
        return WeightControl(
            chunks, wanted.target_zero_share, real, zero.num_zero_experts, ramp, wanted.zero_weight_gain
        )
    if wanted.paired_control == "none":
        return ShareControl()
    if wanted.paired_control == "sparsity":
        ramp = round(wanted.sparsity_ramp_fraction * options.optimizer.train_iters)
        return SparsityControl(chunks, wanted.paired_target, ramp, wanted.sparsity_gain)
    by_layer = wanted.paired_budget == "layer"
    return ThresholdControl(
        chunks,
        wanted.paired_target,
        wanted.share_bounds(),
        options.optimizer.seed,
        by_layer,
        of_decoder=options.model.trainable != "mtp",
    )
