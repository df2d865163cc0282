"""An arm of the quickstart, and the kinds of arms: what each trains with and how it is measured."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

ZEDA_WEIGHT = 2.5
"""w whose share ends at or above one half on the quickstart's teacher (the target is w*Nz/(N+w*Nz))."""


@dataclass(frozen=True)
class Arm:
    """One line of the result table."""

    name: str
    """Name in report.json."""
    start: str = "dynamic"
    """Checkpoint it starts from: `static`, `mean_output`, one of `WIDENED`, `FITS`, `PRUNED` or `FITTED_OVER`, or
    `arms/NAME`: what another arm, earlier in the list, has trained."""
    train: dict[str, str] = field(default_factory=dict)
    """Flags of the training command besides stage1.yaml; empty for an untrained arm."""
    measure: dict[str, str] = field(default_factory=dict)
    """Flags of the measuring command."""
    stage: str = "1"
    """2: trains on its own answers to the prompts, with stage2.yaml."""

    @property
    def waits(self) -> bool:
        """It starts from another arm."""
        return self.start.startswith("arms/")


NET = {"--moe-router-load-balancing-type": "none"}


OWN = {"--own-answers": "300"}


def net(name: str, keep: int, seed: int | None = None) -> Arm:
    """Top-k cut to `keep`, weights from all K picks (the teacher's normaliser), same distillation."""
    rule = {"--moe-pick-rule": f"topk={keep}"}
    return Arm(name, "static", {**NET, **rule, **_seed(seed)}, rule)


def zeda(
    name: str, weight: float, loss: str = "forward_kl", seed: int | None = None, start: str = "dynamic"
) -> Arm:
    """Shared zero experts with group-loss weight w."""
    return Arm(
        name,
        start,
        {"--moe-zero-expert-weight": str(weight), "--distill-loss": loss, **_seed(seed)},
    )


def adamoe(name: str) -> Arm:
    """Null experts after AdaMoE: as many as real ones, load balancing over all, weights over the real picks."""
    loss = {"--group-loss-variant": "adamoe", "--renormalize-after-drop": ""}
    return Arm(name, "null", loss)


SILENT = {"--zero-experts-type": "zero"}

FITS = {
    "paired": SILENT,
    "paired_layer": {**SILENT, "--paired-budget": "layer"},
    "paired_norm": {**SILENT, "--fit-target": "norm", "--paired-score": "weight+head"},
    "paired_norm_residual": {"--fit-target": "norm"},
    "constant": {"--zero-experts-type": "constant"},
    "sharp": {**SILENT, "--paired-head": "mlp"},
    "low_rank": {},
    "awake": {"--paired-head": "mlp"},
}
"""Checkpoints with paired zero experts: flags of `zeda fit`, whose default is `low_rank`."""

PRUNED = {"reap_25": "0.25", "reap_50": "0.5"}
"""Checkpoints with fewer experts (REAP): the share that is cut."""

FITTED_OVER = {"reap_25_low_rank": "reap_25"}
"""Checkpoints with paired zero experts over fewer experts: fitted (`FITS["low_rank"]`) to what such a model answers."""

WIDENED = {
    "dynamic": ("8", "zero"),
    "null": ("16", "zero"),
    "learned": ("8", "learned"),
}
"""Checkpoints with shared zero experts: how many, and of which type. `mean_output` is `learned` whose vectors
begin with the mean output of the real experts."""

PAIRED = {"--moe-router-load-balancing-type": "none"}


def paired(name: str, share: float, seed: int | None = None, start: str = "paired", **flags: str) -> Arm:
    """Paired zero experts with the fitted head, frozen unless a flag says otherwise."""
    return Arm(name, start, {**PAIRED, "--target-zero-share": str(share), **_flags(flags), **_seed(seed)})


MATCHED = {"--hidden-loss-coeff": "20", "--lr": "3e-4"}
"""Hidden states matched, at the learning rate that goes with it."""


def matched(arm: Arm) -> Arm:
    """The same arm with hidden states matched."""
    first, _, end = arm.name.partition("_kl")
    return replace(arm, name=f"{first}_matched_kl{end}", train={**arm.train, **MATCHED})


FEW = {
    "router": {"--trainable": "router", "--lr": "3e-3"},
    "norms": {"--trainable": "router+norms", "--lr": "1e-3"},
    "lora": {"--trainable": "lora", "--lr": "3e-3"},
}
"""What trains where not all does, at a learning rate that suits it; the teacher shares the rest of the weights."""


def few(arm: Arm, what: str, steps: int | None = None) -> Arm:
    """The same arm with few weights that train (`FEW`), in as many steps, or in `steps`, which take as long."""
    first, _, end = arm.name.partition("_kl")
    more = {} if steps is None else {"--train-iters": str(steps)}
    name = f"{first}_{what}_kl{end}" + ("" if steps is None else "_same_time")
    return replace(arm, name=name, train={**arm.train, "--teacher-memory": "shared", **FEW[what], **more})


def skipping(start: str, share: float, name: str | None = None) -> Arm:
    """A fit as it is, its dial turned to a share of the picks."""
    dial = {"--zero-dial": "auto", "--target-share": str(share)}
    return Arm(name or f"{start}_untrained", start, measure=dial)


def trained(name: str, seed: int | None = None, head_lr: str = "5e-4") -> Arm:
    """Paired zero experts whose fitted head trains on, at the rate of the other weights unless another is given."""
    return paired(name, 0.5, seed, paired_head_lr=head_lr)


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


def also_on_own_answers(arm: Arm) -> Arm:
    """The arm, measured on its own answers too."""
    return replace(arm, measure={**arm.measure, **OWN})


def beam(name: str, seed: int | None = None, head_lr: str = "0.03", **flags: str) -> Arm:
    """A mask router learned from an open start by straight-through and a sparsity loss (after BEAM)."""
    return fresh(name, "head", 0.5, seed, paired_control="sparsity", paired_head_lr=head_lr, **flags)


def _flags(values: dict[str, str]) -> dict[str, str]:
    """Keyword arguments as flags. A value may hold several words."""
    return {"--" + name.replace("_", "-"): value for name, value in values.items()}


def _seed(seed: int | None) -> dict[str, str]:
    return {} if seed is None else {"--seed": str(seed)}


def dialled(name: str, share: int) -> Arm:
    """A trained arm at another share than it was trained for: only the dial is turned."""
    dial = {"--zero-dial": "auto", "--target-share": str(share / 100)}
    return Arm(f"{name}_dial_{share}", f"arms/{name}", measure=dial)


def fewer(keep: int, share: int) -> Arm:
    """NET trained over random k, measured with so many picks."""
    return Arm(f"net_range_kl_dial_{share}", "arms/net_range_kl", measure={"--moe-pick-rule": f"topk={keep}"})


def longer(arm: Arm, steps: int = 400) -> Arm:
    """The same arm with four times the steps."""
    name, _, seed = arm.name.partition("_seed")
    name += "_4x" + (f"_seed{seed}" if seed else "")
    return replace(arm, name=name, train={**arm.train, "--train-iters": str(steps)})


STAGE1_END = {
    "net_kl": NET | {"--moe-pick-rule": "topk=2"},
    "zeda_stage1_kl": {"--moe-zero-expert-weight": str(ZEDA_WEIGHT)},
    "paired_kl": PAIRED | {"--target-zero-share": "0.5"},
}
"""Arms of stage 1 that go on, and the flags they keep."""
STAGE2_NAMES = {"net_kl": "net", "zeda_stage1_kl": "zeda", "paired_kl": "paired"}


def going_on(start: str, end: str, flags: dict[str, str], stage: str, seed: int | None = None) -> Arm:
    """An arm of stage 1 that goes on: NET, shared or paired zero experts."""
    tail = "" if seed is None else f"_seed{seed}"
    rule = {"--moe-pick-rule": "topk=2"} if start == "net_kl" else {}
    return Arm(
        f"{STAGE2_NAMES[start]}_{end}{tail}",
        f"arms/{start}{tail}",
        {**STAGE1_END[start], **flags, **_seed(seed)},
        rule | OWN,
        stage,
    )


def stage2(start: str, seed: int | None = None) -> Arm:
    """On its own answers, exact reverse KL."""
    return going_on(start, "stage2", {}, "2", seed)


def more(start: str, seed: int | None = None) -> Arm:
    """Stage 1 for as long again as stage 2 takes, with the learning rate of stage 2."""
    return going_on(start, "more", {"--train-iters": "150", "--lr": "2e-4"}, "1", seed)
