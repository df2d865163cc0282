"""The arms of the quickstart, by what they are for."""

from __future__ import annotations

from dataclasses import dataclass

from arm import (
    FITS,
    FITTED_OVER,
    NET,
    PRUNED,
    STAGE1_END,
    WIDENED,
    ZEDA_WEIGHT,
    Arm,
    adamoe,
    also_on_own_answers,
    beam,
    dialled,
    few,
    fewer,
    fresh,
    going_on,
    longer,
    matched,
    more,
    net,
    paired,
    skipping,
    stage2,
    trained,
    zeda,
)

from zeda_megatron.config.fit import FitOptions

__all__ = ["DEFAULT", "EXPORTED", "FITS", "FITTED_OVER", "FULL", "PRUNED", "WIDENED", "Arm"]
WEIGHTS = {25: 0.7, 62: 4.8, 75: 12.0}
"""w for other shares, found by trial."""
SEEDS = (2, 3)
"""Besides the one of stage1.yaml, for the arms whose spread is told."""
_EACH_SEED = (("", None), *((f"_seed{seed}", seed) for seed in SEEDS))

OTHERS = ("constant", "sharp", "awake")
"""Other fits than the default, `low_rank`."""


@dataclass(frozen=True)
class Shape:
    """What the cost of zero experts depends on, in a teacher."""

    hidden: int = 128
    """H."""
    experts: int = 16
    """N."""
    picks: int = 4
    """K."""
    width: int = 96
    """F."""

    def share(self, start: str, share: float) -> float:
        """Share at which the zero experts of a fit cost the multiply-adds that silent ones with a linear head cost at
        `share`: 1 - share, head, stand-ins."""
        (plain, _), (head, stand_in) = self._costs("paired"), self._costs(start)
        return round((share + head - plain) / (1 - stand_in), 3)

    def _costs(self, start: str) -> tuple[float, float]:
        flags = {flag.removeprefix("--").replace("-", "_"): value for flag, value in FITS[start].items()}
        zero = FitOptions(**flags).zero(self.experts, self.width)
        return zero.costs(self.hidden, self.picks, self.width)


def woken(shape: Shape) -> tuple[Arm, Arm]:
    """What `zeda fit` makes, as it is and distilled with hidden states matched; multiply-adds of half the picks."""
    share = shape.share("low_rank", 0.5)
    distilled = matched(paired("low_rank_kl", share, start="low_rank"))
    return skipping("low_rank", share), also_on_own_answers(distilled)


def waking(shape: Shape) -> tuple[Arm, ...]:
    """What it is compared with: other fits, and other ways to skip with hidden states matched."""
    return (
        *(skipping(start, shape.share(start, 0.5)) for start in OTHERS),
        matched(net("net_kl", shape.picks // 2)),
        matched(Arm("zeda_target_kl", "dynamic", {"--target-zero-share": "0.5"})),
        *(
            matched(paired(f"{start}_kl", shape.share(start, 0.5), start=start))
            for start in ("paired", *OTHERS)
        ),
    )


def waking_elsewhere(shape: Shape) -> tuple[Arm, ...]:
    """The same at other shares, and with other seeds."""
    starts = ("paired", "low_rank", "awake")
    return (
        *(
            matched(paired(f"{start}_kl_{share}", shape.share(start, share / 100), start=start))
            for share in (25, 62, 75, 87)
            for start in starts
        ),
        *(
            matched(paired(f"{start}_kl{end}_seed{seed}", shape.share(start, share), seed, start))
            for seed in SEEDS
            for end, share in (("", 0.5), ("_75", 0.75))
            for start in starts
        ),
    )


SHAPE = Shape()
"""Of the quickstart's Qwen3-MoE and of its GLM."""
WOKEN = woken(SHAPE)

UNTRAINED = (
    Arm("static_topk_half", "static", measure={"--moe-pick-rule": "topk=2"}),
    WOKEN[0],
)
RULES = (
    Arm("injected_untrained"),
    Arm("dynamic_skipping", "static", measure={"--moe-pick-rule": "skip"}),
    Arm("top_p", "static", measure={"--moe-pick-rule": "top_p"}),
)
"""Others that are not trained."""
TRAINED = (  # the longest first
    WOKEN[1],
    also_on_own_answers(net("net_kl", 2)),
    zeda("zeda_stage1_ce", ZEDA_WEIGHT, "ce"),
    also_on_own_answers(zeda("zeda_stage1_kl", ZEDA_WEIGHT)),
)
DEFAULT = (*UNTRAINED, *TRAINED, stage2("zeda_stage1_kl"))
RELATIVES = (
    Arm("paired_untrained", "paired"),
    also_on_own_answers(paired("paired_kl", 0.5)),
    fresh("logw_threshold_kl", "weight"),
    beam("beam_kl"),
    trained("paired_trained_kl"),
    Arm("paired_layer_untrained", "paired_layer"),
    paired("paired_layer_kl", 0.5, start="paired_layer", paired_budget="layer"),
    Arm("paired_norm_untrained", "paired_norm"),
    paired("paired_norm_kl", 0.5, start="paired_norm"),
    paired("paired_norm_residual_kl", 0.5, start="paired_norm_residual"),
)
FRONTIER = (
    net("net_kl_25", 3),
    net("net_kl_75", 1),
    *(zeda(f"zeda_stage1_kl_{share}", weight) for share, weight in WEIGHTS.items()),
    *(paired(f"paired_kl_{share}", share / 100) for share in (25, 62, 75)),
)


DIAL = (
    Arm("net_range_kl", "static", {**NET, "--topk-range": "1 4"}, {"--moe-pick-rule": "topk=2"}),
    fewer(3, 25),
    fewer(1, 75),
    paired("paired_range_kl", 0.5, zero_share_range="0 0.75"),
    *(dialled("paired_range_kl", share) for share in (25, 62, 75)),
    *(dialled("paired_kl", share) for share in (25, 62, 75)),
    *(dialled("zeda_stage1_kl", share) for share in (25, 62, 75)),
)
TUNING = (
    *(beam(f"beam_kl_lr{rate}", head_lr=rate) for rate in ("0.01", "0.1", "0.3")),
    *(trained(f"paired_trained_kl_lr{rate}", head_lr=rate) for rate in ("2e-3", "0.015", "0.05")),
)
"""Other learning rates of heads that train."""

LONG = tuple(
    longer(arm)
    for arm in (
        net("net_kl", 2),
        zeda("zeda_stage1_kl", ZEDA_WEIGHT),
        trained("paired_trained_kl_lr2e-3", head_lr="2e-3"),
        *(trained("paired_trained_kl" + end, seed) for end, seed in _EACH_SEED),
        beam("beam_kl_lr0.3", head_lr="0.3"),
        *(beam("beam_kl_lr0.1" + end, seed, head_lr="0.1") for end, seed in _EACH_SEED),
        *(paired("paired_kl" + end, 0.5, seed) for end, seed in _EACH_SEED),
        *(beam("beam_kl" + end, seed) for end, seed in _EACH_SEED),
    )
)
STAGE2 = (
    stage2("net_kl"),
    stage2("paired_kl"),
    *map(more, STAGE1_END),
    *(
        going_on(start, "stage2_sampled", {"--distill-loss": "sampled_reverse_kl"}, "2")
        for start in STAGE1_END
    ),
)
SAME_TIME = {"router": 108, "norms": 108, "lora": 92}
"""Steps that take the processor as long as 100 in which all weights train (`tools.measure.teacher_cost`)."""
FEW_TRAIN = (
    *(
        few(arm, what)
        for arm in (WOKEN[1], paired("paired_kl", 0.5), zeda("zeda_kl", ZEDA_WEIGHT))
        for what in ("router", "norms", "lora")
    ),
    *(few(WOKEN[1], what, steps) for what, steps in SAME_TIME.items()),
)
"""What trains: routers (Router-KD, arXiv 2603.02217), norms too, adapters too."""
RIVALS = (
    *(Arm(f"oea_{first}", "static", measure={"--moe-pick-rule": f"oea={first}"}) for first in (1, 2)),
    *(skipping(name, SHAPE.share("low_rank", 0.5)) for name in FITTED_OVER),
    *(zeda(f"zeda_{start}_kl", ZEDA_WEIGHT, start=start) for start in ("learned", "mean_output")),
)
"""OEA (arXiv 2511.02237), pruning and skipping together, and zero experts that begin with a mean output (in the manner
of MoNE, arXiv 2507.00390) beside those that begin with nothing."""
STUDY = (
    adamoe("adamoe"),
    Arm("zeda_target_kl", "dynamic", {"--target-zero-share": "0.5"}),
    *(Arm(name, name) for name in PRUNED),
)
"""AdaMoE's loss; a share that is held by the controller of w; pruning (REAP)."""
FULL = (
    *DEFAULT,
    *RULES,
    *STAGE2,
    *STUDY,
    *FEW_TRAIN,
    *RIVALS,
    *RELATIVES,
    *FRONTIER,
    *DIAL,
    *TUNING,
    *waking(SHAPE),
    *waking_elsewhere(SHAPE),
    *LONG,
    *(
        arm
        for seed in SEEDS
        for arm in (
            also_on_own_answers(net(f"net_kl_seed{seed}", 2, seed)),
            also_on_own_answers(zeda(f"zeda_stage1_kl_seed{seed}", ZEDA_WEIGHT, seed=seed)),
            also_on_own_answers(paired(f"paired_kl_seed{seed}", 0.5, seed)),
            trained(f"paired_trained_kl_seed{seed}", seed),
            beam(f"beam_kl_seed{seed}", seed),
            net(f"net_kl_75_seed{seed}", 1, seed),
            zeda(f"zeda_stage1_kl_75_seed{seed}", WEIGHTS[75], seed=seed),
            paired(f"paired_kl_75_seed{seed}", 0.75, seed),
            *(make(start, seed) for start in STAGE1_END for make in (stage2, more)),
        )
    ),
)
EXPORTED = WOKEN[1].name
"""The arm that is exported to DIR/hf."""
