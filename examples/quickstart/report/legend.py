"""How each arm of the quickstart is described and coloured; the same everywhere in its report."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Arm:
    """What a report says of an arm besides its figures."""

    note: str = ""
    """One short line."""
    light: str = "#5c6b7a"
    """Colour on a light page."""
    dark: str = "#a3b1bf"
    """Colour on a dark page."""
    baseline: bool = False
    """Not ours: something a reader could have done instead."""
    place: int = 0
    """Number of its colour on a page."""


_OURS = {
    "low_rank_matched_kl": ("zero experts that wake up, distilled (KL, hidden states)", "#ae3ec9", "#e599f7"),
    "low_rank_untrained": ("zero experts that wake up, fitted only", "#9c6bb0", "#c9a3d9"),
    "paired_matched_kl": ("paired zero experts, distilled (KL, hidden states)", "#d9730d", "#ffb066"),
    "zeda_target_matched_kl": ("shared zero experts, distilled (KL, hidden states)", "#1c7ed6", "#74c0fc"),
    "paired_kl": ("a zero expert beside every real one, distilled (KL)", "#d9480f", "#ff922b"),
    "zeda_stage1_kl": ("shared zero experts, distilled (KL)", "#1864ab", "#4dabf7"),
    "zeda_stage1_ce": ("shared zero experts, the paper's stage 1 (CE)", "#0c8599", "#3bc9db"),
    "low_rank_matched_router_kl": ("the same, routers alone train (Router-KD)", "#7048e8", "#b197fc"),
    "low_rank_matched_norms_kl": ("the same, routers and norms train", "#4263eb", "#91a7ff"),
    "low_rank_matched_lora_kl": ("the same, adapters and routers train", "#0ca678", "#63e6be"),
    "paired_router_kl": ("paired, routers alone train (Router-KD)", "#c2255c", "#faa2c1"),
    "paired_norms_kl": ("paired, routers and norms train", "#e64980", "#fcc2d7"),
    "paired_lora_kl": ("paired, adapters and routers train", "#a61e4d", "#f783ac"),
    "zeda_router_kl": ("shared, routers alone train (Router-KD)", "#1971c2", "#a5d8ff"),
    "zeda_norms_kl": ("shared, routers and norms train", "#0c8599", "#66d9e8"),
    "zeda_lora_kl": ("shared, adapters and routers train", "#087f5b", "#63e6be"),
    "zeda_learned_kl": ("shared, each a vector that learns", "#5c940d", "#c0eb75"),
    "zeda_mean_output_kl": ("the same, from the experts' mean output (MoNE)", "#2b8a3e", "#8ce99a"),
    "reap_25_low_rank_untrained": ("a quarter cut (REAP), then fitted to skip", "#74b816", "#a9e34b"),
    "zeda_stage2": ("shared: stage 1, then on-policy (reverse KL)", "#6741d9", "#b197fc"),
    "zeda_stage2_sampled": ("shared: stage 1, then the paper's policy gradient", "#845ef7", "#d0bfff"),
    "zeda_more": ("shared: stage 1, then as long again", "#3b5bdb", "#91a7ff"),
    "paired_stage2": ("paired: stage 1, then on-policy (reverse KL)", "#e8590c", "#ffa94d"),
    "paired_stage2_sampled": ("paired: stage 1, then the paper's policy gradient", "#d6336c", "#faa2c1"),
    "paired_more": ("paired: stage 1, then as long again", "#b02525", "#ffa8a8"),
    "zeda_target_kl": ("shared, w moved to hold a half", "#1098ad", "#66d9e8"),
    "zeda_model_budget_kl": ("shared, one budget for all layers", "#0b7285", "#99e9f2"),
    "logw_threshold_kl": ("threshold on the routing weight, distilled (KL)", "#2b8a3e", "#69db7c"),
    "paired_trained_kl": ("paired, fitted, then the head trained too", "#f08c00", "#ffc078"),
    "paired_range_kl": ("paired, trained for 0-75%", "#c92a2a", "#ff8787"),
    "paired_norm_kl": ("paired, fitted to the size of outputs", "#a61e4d", "#faa2c1"),
    "paired_norm_residual_kl": ("the same, relative to the residual stream", "#5f3dc4", "#d0bfff"),
    "paired_norm_untrained": ("fitted to the size of outputs only", "#c2a33a", "#a68b2d"),
    "paired_untrained": ("paired zero experts, fitted only", "#e08a5b", "#c77b4f"),
    "injected_untrained": ("shared zero experts, as converted", "#7aa6cf", "#6b93b8"),
    "paired_layer_untrained": ("the same, every layer skips half", "#b5763f", "#9c6a3c"),
    "paired_layer_kl": ("paired, every layer skips half", "#5c3c10", "#d9a066"),
}
_BASELINES = {
    "net_range_kl": ("top-k cut, trained for all k (MoE-PHDS, M-MoE)", "#495057", "#ced4da"),
    "oea_1": ("picks among experts the batch needs, 1 each (OEA)", "#862e9c", "#e599f7"),
    "oea_2": ("picks among experts the batch needs, 2 each (OEA)", "#9c36b5", "#eebefa"),
    "net_kl": ("top-k halved, the same distillation (KL)", "#343a40", "#e9ecef"),
    "net_matched_kl": ("top-k halved, distilled (KL, hidden states)", "#212529", "#f1f3f5"),
    "net_stage2": ("top-k halved: the same, then on-policy", "#5c5f66", "#c1c2c5"),
    "net_stage2_sampled": ("top-k halved: then the paper's policy gradient", "#373a40", "#909296"),
    "net_more": ("top-k halved: the same, then as long again", "#25262b", "#dee2e6"),
    "adamoe": ("null experts with AdaMoE's loss, distilled", "#5c940d", "#a9e34b"),
    "beam_kl": ("learned mask in BEAM's manner, distilled", "#c2255c", "#f783ac"),
    "static_topk_half": ("top-k halved, untrained", "#868e96", "#909aa3"),
    "dynamic_skipping": ("second pick dropped when small (NAEE)", "#99752b", "#d0a94f"),
    "reap": ("experts of least router-weighted output cut (REAP)", "#6b7f3a", "#b5c77a"),
    "top_p": ("smallest set with probability p", "#7f6a5c", "#b8a394"),
}
ARMS = {
    **{name: Arm(*about) for name, about in _OURS.items()},
    **{name: Arm(*about, baseline=True) for name, about in _BASELINES.items()},
}
_OTHERS = (("#0b7285", "#66d9e8"), ("#862e9c", "#da77f2"), ("#e67700", "#ffd43b"), ("#364fc7", "#91a7ff"))
_VARIANT = re.compile(r"(_lr[0-9.e-]+)?(_dial)?(_w?[0-9.]+)?(_\d+x)?(_same_time)?(_seed\d+)?$")


def family(name: str) -> str:
    """The arm that a variant belongs to: `net_kl_75` and `net_kl_seed2` to `net_kl`, `..._w4` likewise."""
    return name if name in ARMS else re.sub(_VARIANT, "", name)


def legend(names: list[str]) -> dict[str, Arm]:
    """Arms by name, in the order given; variants look like their family, others get a colour and no note."""
    strangers = [name for name in names if family(name) not in ARMS]
    spare = {name: Arm("", *_OTHERS[i % len(_OTHERS)]) for i, name in enumerate(strangers)}
    return {name: replace(spare.get(name) or ARMS[family(name)], place=i) for i, name in enumerate(names)}


def is_untrained(metrics: dict) -> bool:
    """Whether nothing was trained for an arm, by its figures."""
    return metrics.get("adapt_tokens") == 0
