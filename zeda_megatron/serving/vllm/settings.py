"""What config.json says about routing, checked; the same keys and meanings as in the files for transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..transformers.zero_expert_routing import ZeroExperts, batch_margin, zero_experts

DIALS = ("zce_logit_bias", "zce_threshold", "zce_batch_margin")
"""Keys of config.json that a server may override."""


@dataclass(frozen=True)
class ZeroRouting:
    """How one MoE layer routes."""

    num_real: int
    """N."""
    zero: ZeroExperts
    """The zero experts."""
    top_k: int
    """Picks per token."""
    score: str
    """`softmax`, or `sigmoid` with a bias per expert for the choice."""
    precise: bool = False
    """The router computes in float32 and its weights stay so, whatever the model's type."""
    biased: bool = False
    """Logits have a bias."""
    renormalize: bool = True
    """Weights of the K picks sum to 1."""
    scale: float = 1.0
    """Factor of all weights."""
    groups: tuple[int, int] = (1, 1)
    """Groups of real experts, and from how many of them a token may choose."""
    group_best: int = 2
    """A group's score is the sum of so many of its best experts' scores."""
    masked: bool = False
    """Route over the real experts only: the static model."""
    logit_bias: float = 0.0
    """Shared zero experts: added to their logits."""
    threshold: float = 0.0
    """Paired zero experts: a pick with a lower score is skipped."""
    batch_margin: float = 0.0
    """Paired zero experts: so near the threshold a pick follows its batch (`kept_picks`)."""

    @property
    def rows(self) -> int:
        """Rows of the router's weight in the checkpoint."""
        return self.num_real + self.zero.rows

    @property
    def paired(self) -> bool:
        """Every real expert has a zero expert of its own."""
        return self.zero.terms is not None

    @property
    def needs_residual(self) -> bool:
        return not self.masked and self.paired and "residual" in self.zero.terms


def read_routing(config: Any, moe_layers: int, dials: Mapping[str, Any] | None = None) -> list[ZeroRouting]:
    """The routing of each MoE layer.

    Args:
        config: the Hugging Face config of the model.
        moe_layers: how many MoE layers the model has.
        dials: values that go before those of config.json, under the names in `DIALS`.

    Raises:
        ValueError: a key is missing or makes no sense; the message names it.
    """
    dials = {key: value for key, value in (dials or {}).items() if key in DIALS}
    routing = _shape(config)
    value = {key: dials.get(key, getattr(config, key, None)) for key in DIALS}
    if not routing.paired:
        if value["zce_batch_margin"]:
            raise ValueError(
                "zce_batch_margin: this model's zero experts are shared, paired ones alone have it"
            )
        if "zce_threshold" in dials:
            raise ValueError("this model's zero experts are shared: its dial is zce_logit_bias")
        bias = 0.0 if value["zce_logit_bias"] is None else number("zce_logit_bias", value["zce_logit_bias"])
        return [replace(routing, logit_bias=bias)] * moe_layers
    if "zce_logit_bias" in dials:
        raise ValueError("this model's zero experts are paired: its dial is zce_threshold")
    routing = replace(routing, batch_margin=batch_margin(value["zce_batch_margin"]))
    return [replace(routing, threshold=one) for one in thresholds(value["zce_threshold"], moe_layers)]


def thresholds(value: Any, moe_layers: int) -> list[float]:
    """One threshold per MoE layer from a number or a list; `ValueError` if it does not fit."""
    if value is None:
        raise ValueError(
            "config.json has no zce_threshold: paired routing needs a number, or one per MoE layer"
        )
    values = list(value) if isinstance(value, (list, tuple)) else [value] * moe_layers
    if len(values) != moe_layers:
        raise ValueError(f"zce_threshold {value} has {len(values)} numbers for {moe_layers} MoE layers")
    return [number("zce_threshold", one) for one in values]


def number(key: str, value: Any) -> float:
    """A finite number; `ValueError` naming the key."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{key} {value!r} is not a finite number")
    return float(value)


def _shape(config: Any) -> ZeroRouting:
    """Everything but the dials."""
    kind, words = config.model_type, {}
    groups = getattr(config, "n_group", None) or 1, getattr(config, "topk_group", None) or 1
    if kind == "minimax_m2":
        num_real, score = config.num_local_experts, "sigmoid"
    elif hasattr(config, "n_routed_experts"):
        num_real, score = config.n_routed_experts, "sigmoid"
        words = {"precise": True, "scale": float(config.routed_scaling_factor), "groups": groups}
        if kind == "deepseek_v2":
            score = "softmax"
            words |= {"renormalize": False, "group_best": 1}
            if config.topk_method == "greedy":
                words["groups"] = (1, 1)
    else:
        num_real, score = getattr(config, "num_local_experts", None) or config.num_experts, "softmax"
        words = {"renormalize": bool(getattr(config, "norm_topk_prob", True)), "biased": kind == "gpt_oss"}
    zero = zero_experts(config, num_real)
    return ZeroRouting(
        zero=zero,
        num_real=num_real,
        top_k=config.num_experts_per_tok,
        score=score,
        masked=bool(getattr(config, "use_zce_mask", False)),
        **words,
    )
