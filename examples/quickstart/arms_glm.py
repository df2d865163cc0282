"""The arms of the quickstart with `--model glm`."""

from __future__ import annotations

from functools import partial

import arms
from arm import Arm, also_on_own_answers, going_on, net, paired, stage2, zeda

ZEDA_WEIGHT = 2.5
"""w whose share ends near one half on the GLM teacher (51.7%)."""
SEEDS = (2, 3)
"""Besides the one of stage1.yaml, with `--full`."""

UNTRAINED = (*arms.UNTRAINED, *arms.RULES)
shared = partial(zeda, weight=ZEDA_WEIGHT)
TRAINED = (
    also_on_own_answers(net("net_kl", 2)),
    shared("zeda_stage1_ce", loss="ce"),
    also_on_own_answers(shared("zeda_stage1_kl")),
    arms.WOKEN[1],
)


def zeda_stage2(seed: int | None = None) -> Arm:
    """Shared zero experts go on, on their own answers, with this model's w."""
    return going_on("zeda_stage1_kl", "stage2", {"--moe-zero-expert-weight": str(ZEDA_WEIGHT)}, "2", seed)


STAGE2 = (stage2("net_kl"), zeda_stage2())
DEFAULT = (*UNTRAINED, *TRAINED)
"""Without stage 2: with it the walk takes more than ten minutes."""
FULL = (
    *DEFAULT,
    *STAGE2,
    Arm("paired_untrained", "paired"),
    also_on_own_answers(paired("paired_kl", 0.5)),
    *arms.waking(arms.SHAPE),
    *arms.waking_elsewhere(arms.SHAPE),
    *(
        arm
        for seed in SEEDS
        for arm in (
            also_on_own_answers(net(f"net_kl_seed{seed}", 2, seed)),
            also_on_own_answers(shared(f"zeda_stage1_kl_seed{seed}", seed=seed)),
            paired(f"paired_kl_seed{seed}", 0.5, seed),
            stage2("net_kl", seed),
            zeda_stage2(seed),
        )
    ),
)
