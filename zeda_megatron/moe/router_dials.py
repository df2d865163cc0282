"""The dials of the routers: all that may be turned on a model that is already built, set here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ..config.zero_experts import ZeroExpertConfig
from .paired import KEEP_ALL, paired_modules
from .pick_rules import PickRule
from .stats import layer_of, routers

OPEN = -0.5
"""Threshold of a fresh mask that learns to close: with U = 0 and c = 0 every pick is half a unit inside."""


@dataclass(frozen=True)
class RouterDials:
    """What a router does beyond its weights."""

    zero_mask: bool = False
    """Route over the N real experts only; the layer is then bit-equal to the static one."""
    pick_rule: PickRule | None = None
    """Thins out the picks (baselines)."""
    zero_logit_bias: float = 0.0
    """Added to the logits of shared zero experts: the compute dial at inference."""
    zero_weight: float = ZeroExpertConfig.moe_zero_expert_weight
    """w of the group loss; a share control may move it."""
    sparsity_coeff: float = 0.0
    """Coefficient of the mean gate of paired zero experts as an extra loss (BEAM's regulariser); 0 adds none."""
    loss_factor: float = 1.0
    """Multiplies the losses that the router attaches; above 1 where some micro-batches are padding alone."""


def set_dials(model_chunks, **values) -> None:
    """Give the routers of all layers these values (fields of `RouterDials`)."""
    for router in routers(model_chunks):
        router.dials = replace(router.dials, **values)


@contextmanager
def dialled(model_chunks, **values) -> Iterator[None]:
    """`with dialled(model, zero_weight=3.0): ...`; the dials are as before afterwards, whatever happens inside."""
    before = [(router, router.dials) for router in routers(model_chunks)]
    set_dials(model_chunks, **values)
    try:
        yield
    finally:
        for router, dials in before:
            router.dials = dials


def zero_mask(model_chunks):
    """`with zero_mask(model): ...` runs the static model inside a dynamic one."""
    return dialled(model_chunks, zero_mask=True, pick_rule=None)


def set_thresholds(model_chunks, values: list[float | None]) -> None:
    """Give the paired zero experts of all layers one threshold (a list of one), or each its own (one per decoder layer,
    None leaves it). Thresholds are part of the weights: checkpoints keep them."""
    for router in routers(model_chunks):
        value = values[0 if len(values) == 1 else layer_of(router)]
        if router.paired is not None and value is not None:
            router.paired.threshold.fill_(value)


def open_thresholds(model_chunks) -> None:
    """Let fresh masks, whose threshold keeps every pick, begin to learn: `OPEN`."""
    for paired in paired_modules(model_chunks):
        if float(paired.threshold) == KEEP_ALL:
            paired.threshold.fill_(OPEN)
