"""How each arm of the comparison is described, grouped and coloured; the same everywhere in a report."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """What a report says of an arm besides its figures."""

    note: str
    """One short line."""
    baseline: bool = False
    """Not ours: something a reader could have done instead."""
    trained: bool = True
    light: str = "#5c6b7a"
    """Colour on a light page."""
    dark: str = "#a3b1bf"
    """Colour on a dark page."""


ARMS = {
    "paired_kl": Arm(
        "a zero expert beside every real one, distilled (KL)", False, True, "#d9480f", "#ff922b"
    ),
    "zeda_stage1_kl": Arm("shared zero experts, distilled (KL)", False, True, "#1864ab", "#4dabf7"),
    "zeda_stage1_ce": Arm("shared zero experts, the paper's stage 1 (CE)", False, True, "#0c8599", "#3bc9db"),
    "zeda_stage2": Arm("shared: stage 1, then on-policy (reverse KL)", False, True, "#6741d9", "#b197fc"),
    "zeda_stage2_sampled": Arm(
        "shared: stage 1, then the paper's policy gradient", False, True, "#845ef7", "#d0bfff"
    ),
    "zeda_more": Arm("shared: stage 1, then as long again", False, True, "#3b5bdb", "#91a7ff"),
    "paired_stage2": Arm("paired: stage 1, then on-policy (reverse KL)", False, True, "#e8590c", "#ffa94d"),
    "paired_stage2_sampled": Arm(
        "paired: stage 1, then the paper's policy gradient", False, True, "#d6336c", "#faa2c1"
    ),
    "paired_more": Arm("paired: stage 1, then as long again", False, True, "#b02525", "#ffa8a8"),
    "zeda_target_kl": Arm("shared, w moved to hold a half", False, True, "#1098ad", "#66d9e8"),
    "zeda_model_budget_kl": Arm("shared, one budget for all layers", False, True, "#0b7285", "#99e9f2"),
    "logw_threshold_kl": Arm(
        "threshold on the routing weight, distilled (KL)", False, True, "#2b8a3e", "#69db7c"
    ),
    "paired_trained_kl": Arm("paired, fitted, then the head trained too", False, True, "#f08c00", "#ffc078"),
    "paired_range_kl": Arm("paired, trained for 0-75%", False, True, "#c92a2a", "#ff8787"),
    "paired_norm_kl": Arm("paired, fitted to the size of outputs", False, True, "#a61e4d", "#faa2c1"),
    "paired_norm_residual_kl": Arm(
        "the same, relative to the residual stream", False, True, "#5f3dc4", "#d0bfff"
    ),
    "paired_norm_untrained": Arm("fitted to the size of outputs only", False, False, "#c2a33a", "#a68b2d"),
    "paired_untrained": Arm("paired zero experts, fitted only", False, False, "#e08a5b", "#c77b4f"),
    "injected_untrained": Arm("shared zero experts, as converted", False, False, "#7aa6cf", "#6b93b8"),
    "paired_layer_untrained": Arm("the same, every layer skips half", False, False, "#b5763f", "#9c6a3c"),
    "paired_layer_kl": Arm("paired, every layer skips half", False, True, "#5c3c10", "#d9a066"),
    "net_range_kl": Arm("top-k cut, trained for all k", True, True, "#495057", "#ced4da"),
    "net_kl": Arm("top-k halved, the same distillation (KL)", True, True, "#343a40", "#e9ecef"),
    "net_stage2": Arm("top-k halved: the same, then on-policy", True, True, "#5c5f66", "#c1c2c5"),
    "net_stage2_sampled": Arm(
        "top-k halved: then the paper's policy gradient", True, True, "#373a40", "#909296"
    ),
    "net_more": Arm("top-k halved: the same, then as long again", True, True, "#25262b", "#dee2e6"),
    "adamoe": Arm("null experts with AdaMoE's loss, distilled", True, True, "#5c940d", "#a9e34b"),
    "beam_kl": Arm("learned mask in BEAM's manner, distilled", True, True, "#c2255c", "#f783ac"),
    "static_topk_half": Arm("top-k halved, untrained", True, False, "#868e96", "#909aa3"),
    "dynamic_skipping": Arm("second pick dropped when small (NAEE)", True, False, "#99752b", "#d0a94f"),
    "reap": Arm("experts of least router-weighted output cut (REAP)", True, False, "#6b7f3a", "#b5c77a"),
    "top_p": Arm("smallest set with probability p", True, False, "#7f6a5c", "#b8a394"),
}
_OTHERS = (("#0b7285", "#66d9e8"), ("#862e9c", "#da77f2"), ("#e67700", "#ffd43b"), ("#364fc7", "#91a7ff"))


_VARIANT = re.compile(r"(_lr[0-9.e-]+)?(_dial)?(_w?[0-9.]+)?(_\d+x)?(_seed\d+)?$")


def family(name: str) -> str:
    """The arm that a variant belongs to: `net_kl_75` and `net_kl_seed2` to `net_kl`, `..._w4` likewise."""
    return name if name in ARMS else re.sub(_VARIANT, "", name)


def legend(names: list[str]) -> dict[str, Arm]:
    """Arms by name, in the order given; variants look like their family, others get a colour and no note."""
    others = [name for name in names if family(name) not in ARMS]
    spare = {name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(others)}
    return {name: ARMS.get(family(name)) or Arm("", False, True, *spare[name]) for name in names}
