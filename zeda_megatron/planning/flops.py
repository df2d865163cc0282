"""FLOP accounting: what one token costs, part by part, with and without zero experts.

A multiply-add is two FLOPs; only matrix products count (norms, softmax and rotary embedding are left out).
Zero experts take the share `zero_share` away from the routed experts and add `zero_rows` rows to each router.

The paper's "FLOP theory" for Qwen3-30B-A3B (zero share .5, lengths 1k to 8k: prefill 1.40x to 1.18x, decode
1.44x to 1.26x) comes out of these formulas to both digits with `lm_head=False`, a router widened by 64 rows,
and `keys` = L in prefill (no discount for causality), L/2 in decode (mean context of L generated tokens).
Those are the conventions that fit, not ones the paper states; the four figures are a test.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from ..errors import UserError
from .geometry import Geometry


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token's forward pass, all layers together."""

    attention_projections: float
    """Query, key, value and output projections (with latent attention: both steps)."""
    attention_scores: float
    """Scores and weighted values over the attended keys."""
    router: float
    """Router rows, zero experts included."""
    routed_experts: float
    """The real experts that were picked: proportional to 1 - zero share."""
    shared_experts: float
    """Experts every token uses."""
    dense_mlp: float
    """MLP of the layers without experts."""
    lm_head: float
    """Logits of one position."""

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    def as_dict(self) -> dict[str, float]:
        """Parts and `total`, in FLOPs per token."""
        return {**asdict(self), "total": self.total}


def flops_per_token(
    geometry: Geometry,
    keys: float,
    zero_share: float = 0.0,
    zero_rows: int = 0,
    lm_head: bool = True,
    cached: bool = False,
) -> Flops:
    """FLOPs of one token that attends to `keys` positions.

    `cached` counts latent attention the way decoding does it (query projected into latent space, weights
    absorbed); it makes no difference for grouped-query attention. Raises `UserError` for a zero share outside
    [0, 1].
    """
    if not 0.0 <= zero_share <= 1.0:
        raise UserError(f"--zero-share {zero_share} is not a share: give a number from 0 to 1")
    per_key = geometry.attention.per_cached_key if cached else geometry.attention.per_key
    hidden, moe = geometry.hidden, geometry.moe_layers
    rows = geometry.topk * (1.0 - zero_share)
    return Flops(
        attention_projections=2.0 * geometry.layers * geometry.attention.projection,
        attention_scores=2.0 * geometry.layers * per_key * keys,
        router=2.0 * moe * hidden * (geometry.experts + zero_rows),
        routed_experts=2.0 * moe * rows * geometry.expert,
        shared_experts=2.0 * moe * 3 * hidden * geometry.shared_width,
        dense_mlp=2.0 * (geometry.layers - moe) * 3 * hidden * geometry.dense_width,
        lm_head=2.0 * hidden * geometry.vocabulary if lm_head else 0.0,
    )


def flop_ratio(
    geometry: Geometry,
    keys: float,
    zero_share: float,
    zero_rows: int,
    lm_head: bool = True,
    cached: bool = False,
) -> float:
    """FLOPs of the static model divided by those of the dynamic one: the speed-up if only FLOPs counted."""
    static = flops_per_token(geometry, keys, lm_head=lm_head, cached=cached)
    dynamic = flops_per_token(geometry, keys, zero_share, zero_rows, lm_head, cached)
    return static.total / dynamic.total
