"""What holds the zero share while the model adapts: the base of all controls, and the one of pick rules."""

from __future__ import annotations

import random
from typing import Any

import torch

from ..moe.pick_rules import StaticTopK
from ..moe.router_dials import set_dials
from ..moe.stats import StatsReport


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
