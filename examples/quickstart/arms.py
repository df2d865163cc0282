"""The arms of the quickstart: what each one trains with and how it is measured."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Arm:
    """One line of the result table."""

    name: str
    """Name in report.json."""
    start: str = "dynamic"
    """Checkpoint it starts from: `static`, `dynamic` (shared zero experts) one of `FITS`, or `arms/NAME`: what
    another arm, earlier in the list, has trained."""
    train: dict[str, str] = field(default_factory=dict)
    """Flags of the training command besides stage1.yaml; empty for an untrained arm."""
    measure: dict[str, str] = field(default_factory=dict)
    """Flags of the measuring command."""

    @property
    def waits(self) -> bool:
        """It starts from another arm."""
        return self.start.startswith("arms/")


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


FITS = {
    "paired": {"--fit-target": "effect"},
    "paired_norm": {"--fit-target": "norm", "--paired-score": "weight+head"},
    "paired_norm_residual": {"--fit-target": "norm"},
}
"""Checkpoints with paired zero experts: flags of tools/fit_zero_rows.py."""

PAIRED = {"--moe-router-load-balancing-type": "none"}


def paired(name: str, share: float, seed: int | None = None, start: str = "paired", **flags: str) -> Arm:
    """Paired zero experts with the fitted head, frozen unless a flag says otherwise."""
    return Arm(name, start, {**PAIRED, "--target-zero-share": str(share), **_flags(flags), **_seed(seed)})


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
    """Keyword arguments as flags. A value may hold several words."""
    return {"--" + name.replace("_", "-"): value for name, value in values.items()}


def _seed(seed: int | None) -> dict[str, str]:
    return {} if seed is None else {"--seed": str(seed)}


ZEDA_WEIGHT = 2.5
"""w whose share ends at or above one half on the quickstart's teacher (the target is w*Nz/(N+w*Nz))."""
SEEDS = (2, 3)
"""Besides the one of stage1.yaml, for the arms whose spread is told."""

UNTRAINED = (
    Arm("injected_untrained"),
    Arm("static_topk_half", "static", measure={"--moe-pick-rule": "topk=2"}),
    Arm("dynamic_skipping", "static", measure={"--moe-pick-rule": "skip"}),
    Arm("top_p", "static", measure={"--moe-pick-rule": "top_p"}),
    Arm("paired_untrained", "paired"),
)
TRAINED = (
    net("net_kl", 2),
    zeda("zeda_stage1_ce", ZEDA_WEIGHT, "ce"),
    zeda("zeda_stage1_kl", ZEDA_WEIGHT),
    paired("paired_kl", 0.5),
)
DEFAULT = UNTRAINED + TRAINED
RELATIVES = (
    fresh("logw_threshold_kl", "weight"),
    beam("beam_kl"),
    paired("paired_trained_kl", 0.5, paired_head_lr="2e-3"),
    Arm("paired_norm_untrained", "paired_norm"),
    paired("paired_norm_kl", 0.5, start="paired_norm"),
    paired("paired_norm_residual_kl", 0.5, start="paired_norm_residual"),
)
FRONTIER = (
    net("net_kl_25", 3),
    net("net_kl_75", 1),
    zeda("zeda_stage1_kl_w0.8", 0.8),
    zeda("zeda_stage1_kl_w4", 4.0),
    zeda("zeda_stage1_kl_w8", 8.0),
    *(paired(f"paired_kl_{share:.0%}".rstrip("%"), share) for share in (0.25, 0.62, 0.75)),
)


def dialled(name: str, share: int) -> Arm:
    """A trained arm at another share than it was trained for: only the dial is turned."""
    dial = {"--zero-dial": "auto", "--target-share": str(share / 100)}
    return Arm(f"{name}_dial_{share}", f"arms/{name}", measure=dial)


DIAL = (
    paired("paired_range_kl", 0.5, zero_share_range="0 0.75"),
    *(dialled("paired_range_kl", share) for share in (25, 62, 75)),
    *(dialled("paired_kl", share) for share in (25, 62, 75)),
    *(dialled("zeda_stage1_kl", share) for share in (25, 62, 75)),
)
FULL = (
    *DEFAULT,
    *RELATIVES,
    *FRONTIER,
    *DIAL,
    *(
        arm
        for seed in SEEDS
        for arm in (
            net(f"net_kl_seed{seed}", 2, seed),
            zeda(f"zeda_stage1_kl_seed{seed}", ZEDA_WEIGHT, seed=seed),
            paired(f"paired_kl_seed{seed}", 0.5, seed),
            beam(f"beam_kl_seed{seed}", seed),
            net(f"net_kl_75_seed{seed}", 1, seed),
            paired(f"paired_kl_75_seed{seed}", 0.75, seed),
        )
    ),
)
EXPORTED = "zeda_stage1_kl"
"""The arm that is exported to DIR/hf."""
