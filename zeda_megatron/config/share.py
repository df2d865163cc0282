"""Options of what steers the zero share during adaptation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ..errors import UserError
from .arguments import Amount, Share, Whole

BUDGETS = ("model", "layer")


@dataclass(frozen=True)
class ShareOptions:
    """The zero share and what holds it."""

    target_zero_share: Share | None = None
    """Zero share to hold. Paired zero experts: by their threshold, calibrated at the end; default 0.5. Shared ones:
    by the weight w of the group loss, which a slow controller moves; default: w stays at
    --moe-zero-expert-weight."""

    zero_share_range: Annotated[list[str], "LOW HIGH"] | None = None
    """Two numbers: every step draws its target share between them, so one model with paired zero experts serves at
    many shares."""

    topk_range: Annotated[list[str], "LOW HIGH"] | None = None
    """Two whole numbers: every step draws k between them and keeps each token's k heaviest picks (NET for many
    shares)."""

    zero_weight_gain: Amount = 16.0
    """Gain of the controller of w: growth of log w per unit of missing share; its integral moves a fiftieth as fast."""

    zero_share_ramp_fraction: Amount = 0.5
    """Share of the steps over which that controller goes from the first step's share to the target."""

    paired_control: Literal["threshold", "sparsity", "none"] = "threshold"
    """threshold: follow the quantile of recent scores. sparsity: keep the threshold, train the head against a
    sparsity loss (a BEAM-like mask router). none: leave the threshold as it is."""

    paired_budget: Literal[BUDGETS] = "model"
    """model: one threshold, layers share the target among themselves. layer: each layer holds the target itself."""

    paired_head_lr: Amount = 0.0
    """Peak learning rate of the head; 0 keeps it as it was fitted. A head that trains computes all picks."""

    sparsity_ramp_fraction: Amount = 0.1
    """Share of the steps over which the target of the sparsity control rises from 0."""

    sparsity_gain: Amount = 0.3
    """Gain of the sparsity control: coefficient per unit of missing share."""

    calibration_rows: Whole = 16
    """Rows on which the threshold is set at the end; 0 leaves the last step's."""

    @property
    def paired_target(self) -> float:
        """Zero share of paired zero experts."""
        return 0.5 if self.target_zero_share is None else self.target_zero_share

    def share_bounds(self) -> tuple[float, float] | None:
        """`zero_share_range` as numbers."""
        return _bounds("--zero-share-range", self.zero_share_range, float, 0.0, 1.0)

    def topk_bounds(self, topk: int | None = None) -> tuple[int, int] | None:
        """`topk_range` as whole numbers from 1 to the model's K (if it is given)."""
        return _bounds("--topk-range", self.topk_range, int, 1, None if topk is None else topk + 1)

    def validate(self) -> None:
        """Raise `UserError` naming the flag that cannot work."""
        self.share_bounds()
        self.topk_bounds()
        if self.paired_control == "sparsity" and not self.paired_head_lr:
            raise UserError(
                "--paired-control sparsity needs --paired-head-lr: the sparsity loss trains the head"
            )
        if self.paired_control == "sparsity" and self.paired_budget == "layer":
            raise UserError(
                "--paired-budget layer needs --paired-control threshold: a sparsity loss has one target"
            )


def _bounds(flag: str, words: list[str] | None, number: type, least, below):
    """Two numbers from words, least <= low <= high < below."""
    if words is None:
        return None
    try:
        low, high = map(number, words)
        if not least <= low <= high or (below is not None and high >= below):
            raise ValueError
    except ValueError:
        end = "" if below is None else f" < {below}"
        raise UserError(
            f"{flag} {' '.join(words)}: give two {'whole ' if number is int else ''}numbers, "
            f"{least} <= low <= high{end}"
        ) from None
    return low, high
