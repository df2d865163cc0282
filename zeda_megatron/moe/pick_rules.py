"""Rules that thin out the router's picks: halved top-k, Dynamic Skipping, top-p; and one that chooses them among the
experts that a decoding batch needs anyway, OEA. The honest baselines.

A rule of the first kind sees the K picks of each token with their weights and says which to keep. The kept weights stay
as the teacher's router gave them (its normaliser), or are rescaled to sum to the same total.
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


@dataclass(frozen=True)
class Piggyback:
    """Opportunistic expert activation (OEA, arXiv 2511.02237): of the tokens that are decoded together each asks for
    its `first` best experts; all of them then pick their K among the experts that somebody asked for."""

    first: int
    """k0: experts that a token asks for."""
    batch: int = 16
    """Tokens decoded together."""
    renormalize: bool = False
    """Weights are the router's, over the picks it then makes."""

    def keep(self, weights_TK: torch.Tensor) -> torch.Tensor:
        return weights_TK > 0

    def limit(self, logits_TN: torch.Tensor, valid_T: torch.Tensor | None) -> torch.Tensor:
        """Logits of experts that nobody of a token's batch asked for become -inf. [T, N]; valid_T: no padding."""
        asked_TN = torch.zeros_like(logits_TN, dtype=torch.bool)
        asked_TN.scatter_(1, logits_TN.topk(self.first, dim=1).indices, True)
        needed_TN = asked_TN if valid_T is None else asked_TN & valid_T[:, None]
        group_T, needed_GN = needed_together(needed_TN, self.batch)
        return logits_TN.masked_fill(~(asked_TN | needed_GN[group_T]), -torch.inf)


def together(tokens: int, batch: int) -> torch.Tensor:
    """Number [T] of the batch that each of T tokens of a pass is decoded in: neighbours, which mostly are of one
    sequence, fall into different ones."""
    return torch.arange(tokens) % max(-(-tokens // batch), 1)


def needed_together(map_TN: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`together` of the tokens of a routing map [T, N], and which experts each of these batches needs, [G, N] bool."""
    group_T = together(len(map_TN), batch).to(map_TN.device)
    groups = -(-len(map_TN) // batch)
    counts_GN = torch.zeros(groups, map_TN.shape[1], dtype=torch.int64, device=map_TN.device)
    return group_T, counts_GN.index_add_(0, group_T, map_TN.long()) > 0


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
    """`topk=2`, `skip=0.4`, `top_p=0.7`, each with an optional `,renormalize`; `oea=1`, or `oea=1/32`."""
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
        if name == "oea" and not renormalize:
            first, _, batch = value.partition("/")
            if int(first) >= 1 and int(batch or 1) >= 1:
                return Piggyback(int(first), int(batch or Piggyback.batch))
    except ValueError:
        pass
    raise UserError(f"--moe-pick-rule {text!r} is unknown; write topk=2, skip=0.4, top_p=0.7 or oea=1")
