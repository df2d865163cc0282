"""The arms of the quickstart: what each one trains with and how it is measured."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Arm:
    """One line of the result table."""

    name: str
    """Name in report.json."""
    start: str = "dynamic"
    """Checkpoint it starts from: `static`, `dynamic` (shared zero experts) or `paired` (fitted heads)."""
    train: dict[str, str] = field(default_factory=dict)
    """Flags of the training command besides stage1.yaml; empty for an untrained arm."""
    measure: dict[str, str] = field(default_factory=dict)
    """Flags of the measuring command."""


NET = {"--moe-router-load-balancing-type": "none"}


def net(name: str, keep: int, seed: int | None = None) -> Arm:
    """Top-k cut to `keep`, weights from all K picks (the teacher's normaliser), same distillation."""
    rule = {"--moe-pick-rule": f"topk={keep}"}
    return Arm(name, "static", {**NET, **rule, **_seed(seed)}, rule)


def zeda(name: str, weight: float, loss: str = "forward_kl", seed: int | None = None) -> Arm:
    """Shared zero experts with group-loss weight w."""
    return Arm(
        name,
        "dynamic",
        {"--moe-zero-expert-weight": str(weight), "--distill-loss": loss, **_seed(seed)},
    )


PAIRED = {"--moe-router-load-balancing-type": "none"}


def paired(name: str, share: float, seed: int | None = None, **flags: str) -> Arm:
    """Paired zero experts with the fitted head, frozen unless a flag says otherwise."""
    return Arm(name, "paired", {**PAIRED, "--target-zero-share": str(share), **_flags(flags), **_seed(seed)})


def fresh(name: str, score: str, share: float = 0.5, seed: int | None = None, **flags: str) -> Arm:
    """Paired routing without a fit, from the static model."""
    return Arm(
        name,
        "static",
        {
            **PAIRED,
            "--zero-expert-routing": "paired",
            "--paired-score": score,
            "--target-zero-share": str(share),
            **_flags(flags),
            **_seed(seed),
        },
    )


def beam(name: str, seed: int | None = None, head_lr: str = "0.03", **flags: str) -> Arm:
    """A mask router learned from an open start by straight-through and a sparsity loss (after BEAM)."""
    return fresh(name, "head", 0.5, seed, paired_control="sparsity", paired_head_lr=head_lr, **flags)


def _flags(values: dict[str, str]) -> dict[str, str]:
    return {"--" + name.replace("_", "-"): value for name, value in values.items()}


def _seed(seed: int | None) -> dict[str, str]:
    return {} if seed is None else {"--seed": str(seed)}


ZEDA_WEIGHT = 2.3
"""w whose share ends at or above one half on the quickstart's teacher (the target is w*Nz/(N+w*Nz))."""

UNTRAINED = (
    Arm("injected_untrained"),
    Arm("static_topk_half", "static", measure={"--moe-pick-rule": "topk=2"}),
    Arm("dynamic_skipping", "static", measure={"--moe-pick-rule": "skip"}),
    Arm("top_p", "static", measure={"--moe-pick-rule": "top_p"}),
)
TRAINED = (
    net("net_kl", 2),
    zeda("zeda_stage1_ce", ZEDA_WEIGHT, "ce"),
    zeda("zeda_stage1_kl", ZEDA_WEIGHT),
)
DEFAULT = UNTRAINED + TRAINED
FULL = (
    *DEFAULT,
    *(net(f"net_kl_seed{seed}", 2, seed) for seed in (2, 3)),
    *(zeda(f"zeda_stage1_kl_seed{seed}", ZEDA_WEIGHT, seed=seed) for seed in (2, 3)),
    net("net_kl_25", 3),
    net("net_kl_75", 1),
    zeda("zeda_stage1_kl_w0.7", 0.7),
    zeda("zeda_stage1_kl_w4", 4.0),
    zeda("zeda_stage1_kl_w7", 7.0),
)
EXPORTED = "zeda_stage1_kl"
"""The arm that is exported to DIR/hf."""
