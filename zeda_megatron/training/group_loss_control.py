"""Control of the group loss of shared zero experts: its weight w."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..moe.router_dials import set_dials
from ..moe.stats import StatsReport
from .share_control import ShareControl


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
