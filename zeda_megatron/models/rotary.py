"""Rotary embeddings of all models, read from a config: frequencies are those that transformers computes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..strict_json import is_number
from .config_values import ROPE_THETAS

KINDS = ("default", "linear", "llama3", "yarn")
"""Values of `rope_type` whose frequencies do not depend on a sequence's length."""


@dataclass(frozen=True)
class Rotary:
    """What turns queries and keys."""

    base: float
    """`rope_theta`."""
    frequencies: tuple[float, ...] = field(repr=False)
    """Radians per position of each pair of channels, float32; channels without a frequency are not turned."""
    factor: float = 1.0
    """Of cosine and sine (YaRN's attention factor)."""


def read_rotary(hf: PreTrainedConfig, channels: int, may_be_partial: bool) -> Rotary | str:
    """The rotary embedding of a config, as transformers reads it; or what is wrong with it, in words.

    Args:
        channels: of a head, as far as they may be turned.
        may_be_partial: the family's attention leaves channels without a frequency as they are.
    """
    told = hf.rope_parameters
    kind, theta = told.get("rope_type", "default"), told.get("rope_theta")
    if kind not in KINDS:
        return f"rope_type {str(kind)[:40]!r} is not supported, only {', '.join(KINDS)}"
    low, high = ROPE_THETAS
    if not is_number(theta) or not low <= theta <= high:
        return f"rope_theta {str(theta)[:40]} must be a number from {low:g} to {high:g}"
    part = told.get("partial_rotary_factor", 1.0)
    if part != 1.0 and not may_be_partial:
        return f"partial_rotary_factor {str(part)[:40]} is not supported, only 1.0"
    turned = int(channels * part) if is_number(part) else 0
    if not 0 < turned <= channels or turned % 2:
        return f"partial_rotary_factor {str(part)[:40]} makes no even number of {channels} channels"
    if kind == "default":
        powers = torch.arange(0, turned, 2, dtype=torch.float) / turned
        return Rotary(float(theta), tuple((1.0 / theta**powers).tolist()))
    try:
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](hf, torch.device("cpu"))
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        return f"transformers cannot use it: {type(error).__name__} {str(error)[:100]}"
    if len(frequencies) != turned // 2 or not (frequencies.isfinite().all() and math.isfinite(factor)):
        return f"it gives {len(frequencies)} frequencies and a factor of {factor} for {turned} channels"
    return Rotary(float(theta), tuple(frequencies.tolist()), float(factor))


def factor_fields(rotary: Rotary) -> dict[str, float]:
    """Attributes of Megatron's config (no fields of it) from which its grouped-query attention takes the factor.

    It is (0.1 m ln s + 1) / (0.1 n ln s + 1) there, of these three.
    """
    if rotary.factor == 1.0:
        return {}
    return {
        "yarn_rotary_scaling_factor": math.e,
        "yarn_mscale": 10.0 * (rotary.factor - 1.0),
        "yarn_mscale_all_dim": 0.0,
    }
