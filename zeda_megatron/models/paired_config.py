"""Paired zero experts in config.json: `zce_routing`, `zce_score` and `zce_threshold`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from ..config.zero_experts import SCORE_TERMS, ZERO_EXPERT_ROUTINGS, ZeroExpertConfig
from ..errors import UserError
from ..strict_json import is_number
from .weight_kinds import Setting, WeightMapping

PAIRED_KEYS = ("zce_routing", "zce_score", "zce_threshold")


def is_paired(config: dict[str, Any]) -> bool:
    """True if `zce_routing` says paired; absent means shared. Raises `UserError` for other values."""
    routing = config.get("zce_routing") or "shared"
    if not isinstance(routing, str) or routing not in ZERO_EXPERT_ROUTINGS:
        raise UserError(
            f"config.json: zce_routing {routing!r} is unknown; known: {', '.join(ZERO_EXPERT_ROUTINGS)}"
        )
    return routing == "paired"


def paired_experts_of(config: dict[str, Any]) -> ZeroExpertConfig:
    """The paired zero experts that a Hugging Face config describes.

    Raises:
        UserError: naming the key that is missing or makes no sense.
    """
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    real = next((config[name] for name in names if name in config), None)
    nums, kinds = config.get("zce_nums"), config.get("zce_types") or ["zero"]
    if nums != [real] or kinds != ["zero"]:
        raise UserError(
            f"config.json: zce_nums {nums} with zce_types {kinds} does not fit paired routing, which has one zero "
            f"expert per real one: [{real}] and ['zero']"
        )
    score = config.get("zce_score", ZeroExpertConfig.paired_score)
    terms = score.split("+") if isinstance(score, str) else [None]
    if not set(terms) <= set(SCORE_TERMS) or len(set(terms)) < len(terms):
        raise UserError(
            f"config.json: zce_score {score!r} is unknown; join some of {', '.join(SCORE_TERMS)} with '+'"
        )
    return ZeroExpertConfig(real, "zero", "paired", score)


def settings_of(config: dict[str, Any], mappings: Iterable[WeightMapping]) -> dict[str, torch.Tensor]:
    """The numbers that config.json holds for these mappings, by the name that `Setting` gives them: float32 [1].

    Raises:
        UserError: a key is missing, is no finite number, or is a list of the wrong length.
    """
    by_key: dict[str, list[str]] = {}
    for mapping in mappings:
        if isinstance(mapping, Setting):
            by_key.setdefault(mapping.key, []).append(mapping.hf)
    found = {}
    for key, names in by_key.items():
        value = config.get(key)
        if value is None:
            raise UserError(f"config.json: {key} is missing; paired zero experts need a number")
        values = value if isinstance(value, list) else [value] * len(names)
        if len(values) != len(names) or not all(map(is_number, values)):
            raise UserError(
                f"config.json: {key} {value!r} must be a finite number, or a list of {len(names)}, one per MoE layer"
            )
        found |= {name: torch.tensor([v], dtype=torch.float32) for name, v in zip(names, values)}
    return found


class SettingsWriter:
    """Collects the numbers of all layers, in layer order, for config.json."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, mapping: Setting, tensor: torch.Tensor) -> None:
        """Take one layer's number, [1]. Raises `UserError` if it is not finite (JSON has no such numbers)."""
        value = float(tensor)  # a double holds every float32 exactly
        if not math.isfinite(value):
            raise UserError(f"{mapping.mcore} is {value}: calibrate the threshold before the export")
        self._values.setdefault(mapping.key, []).append(value)

    def entries(self) -> dict[str, float | list[float]]:
        """Keys of config.json: one number where all layers agree, else one per MoE layer."""
        return {key: values[0] if len(set(values)) == 1 else values for key, values in self._values.items()}
