"""Low-rank adapters (LoRA, arXiv 2106.09685) beside frozen weights, as one setting of a run and of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError

LORA_TARGETS = ("attention", "experts", "shared")
"""Projections of attention (linear attention too); real experts; shared experts and dense MLPs."""
ADAPTER = ".adapter."
"""Part of the name of every parameter of an adapter."""
RANK_STEP = 8
"""Grouped products want rows of whole 16 bytes, which 8 numbers of 2 bytes are."""


@dataclass(frozen=True)
class LoRA:
    """Adapters that a model has: a projection W x becomes W x + alpha / rank * up (down x)."""

    rank: int = 16
    """Rows of `down`, columns of `up`."""

    alpha: float = 32.0
    """Over the rank, the factor of an adapter's output."""

    targets: str = "+".join(LORA_TARGETS)
    """What has adapters: words of `LORA_TARGETS` joined by '+'."""

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def has(self, target: str) -> bool:
        """`target` is one of the targets."""
        return target in self.targets.split("+")

    def validate(self) -> None:
        """Raise `UserError` naming the flag that cannot work."""
        if self.rank < RANK_STEP or self.rank % RANK_STEP:
            raise UserError(
                f"--lora-rank {self.rank} must be a multiple of {RANK_STEP}, at least {RANK_STEP}"
            )
        if not self.alpha > 0:
            raise UserError(f"--lora-alpha {self.alpha} must be above 0")
        for word in self.targets.split("+"):
            if word not in LORA_TARGETS:
                raise UserError(
                    f"--lora-targets {self.targets!r}: {word!r} is unknown; join words of {', '.join(LORA_TARGETS)} "
                    "by '+'"
                )
