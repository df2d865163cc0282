"""Rules that thin out the router's picks: halved top-k, Dynamic Skipping, top-p. The honest baselines.

A rule sees the K picks of each token with their weights and says which to keep. The kept weights stay as the
teacher's router gave them (its normaliser), or are rescaled to sum to the same total.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import UserError


class PickRule(Protocol):
    """`keep(weights_TK)` takes weights in descending order and returns a bool mask of the same shape."""

    renormalize: bool

    def keep(self, weights_TK: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class StaticTopK:
    """Keep the k heaviest picks of every token (NET is this rule plus distillation)."""

    k: int
    """Picks kept per token."""
    renormalize: bool = False
    """Rescale the kept weights to the total before the cut."""

    def keep(self, weights_TK: torch.Tensor) -> torch.Tensor:
        keep = torch.zeros_like(weights_TK, dtype=torch.bool)
        keep[:, : self.k] = True
        return keep


@dataclass(frozen=True)
class DynamicSkipping:
    """Skip a pick whose weight is below `ratio` times the heaviest one (Lu et al. 2024, for any K)."""

    ratio: float
    """Between 0 (keep all) and 1 (keep only the heaviest)."""
    renormalize: bool = False
    """Rescale the kept weights to the total before the cut."""

    def keep(self, weights_TK: torch.Tensor) -> torch.Tensor:
        return weights_TK >= self.ratio * weights_TK[:, :1]


@dataclass(frozen=True)
class TopP:
    """Keep the heaviest picks until their share of the total weight reaches p (Huang et al. 2024)."""

    p: float
    """Between 0 (only the heaviest) and 1 (keep all)."""
    renormalize: bool = False
    """Rescale the kept weights to the total before the cut."""

    def keep(self, weights_TK: torch.Tensor) -> torch.Tensor:
        share = weights_TK / weights_TK.sum(dim=1, keepdim=True).clamp(min=1e-20)
        return (share.cumsum(dim=1) - share) < self.p


def apply_pick_rule(
    rule: PickRule, probs_TN: torch.Tensor, map_TN: torch.Tensor, topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Thin out a routing. Shapes [T, N]; returns (probs, map) with the dropped slots at 0 / False.

    The heaviest pick of a token is always kept.
    """
    weights_TK, index_TK = probs_TN.masked_fill(~map_TN, -1.0).topk(topk, dim=1)
    picked_TK = weights_TK >= 0
    keep_TK = rule.keep(weights_TK.detach().clamp(min=0))
    keep_TK[:, 0] = True
    kept_map = torch.zeros_like(map_TN).scatter(1, index_TK, keep_TK & picked_TK)
    kept = probs_TN * kept_map
    if rule.renormalize:
        kept = kept * (probs_TN.sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1e-20))
    return kept, kept_map


def parse_pick_rule(text: str) -> PickRule:
    """`topk=2`, `skip=0.4`, `top_p=0.7`, each with an optional `,renormalize`."""
    head, *flags = [part.strip() for part in text.split(",")]
    name, _, value = head.partition("=")
    if any(flag != "renormalize" for flag in flags):
        raise UserError(f"--moe-pick-rule {text!r}: only ',renormalize' may follow the rule")
    renormalize = bool(flags)
    try:
        if name == "topk" and int(value) >= 1:
            return StaticTopK(int(value), renormalize)
        if name == "skip" and 0 <= float(value) <= 1:
            return DynamicSkipping(float(value), renormalize)
        if name == "top_p" and 0 <= float(value) <= 1:
            return TopP(float(value), renormalize)
    except ValueError:
        pass
    raise UserError(f"--moe-pick-rule {text!r} is unknown; write topk=2, skip=0.4 or top_p=0.7")
