"""Configuration of zero experts. Small frozen dataclasses, a docstring under each field."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError

ZERO_EXPERT_TYPES = ("zero", "copy", "learned", "constant", "low_rank")
PAIRED_TYPES = ("zero", "constant", "low_rank")
"""Those that paired zero experts may have; shared ones have the first three of all."""
ZERO_EXPERT_ROUTINGS = ("shared", "paired")
SCORE_TERMS = ("weight", "head", "residual")
GROUP_LOSS_VARIANTS = ("routed", "authors", "adamoe")
GROUP_LOSS_SCOPES = ("tp_cp", "tp_dp_cp")


@dataclass(frozen=True)
class ZeroExpertConfig:
    """Zero experts of every MoE layer and the loss that steers their share (arXiv 2605.18643, section 3)."""

    num_zero_experts: int = 0
    """Nz: router rows added behind the N rows of the real experts. 0 leaves the model static."""

    zero_experts_type: str = "zero"
    """`zero`: output 0, no parameters. `copy`: output = input (the paper shows that it fails; for study).
    `learned`: a bias vector per zero expert that starts at exactly 0. Paired ones are silent, or answer in their
    expert's place (`moe.stand_ins`): `constant` with a vector, `low_rank` with a linear map and a vector."""

    zero_expert_routing: str = "shared"
    """`shared`: the paper's Nz zero experts compete with all experts. `paired`: every real expert has its own,
    which takes picks of small predicted contribution (`moe.paired`); Nz = N and no router rows are added."""

    paired_score: str = "weight+head+residual"
    """Terms of a pick's score under paired routing. `weight`: log of its routing weight. `head`: the predicted log
    norm of the expert's output. `residual`: minus the log norm of the residual stream."""

    paired_head_width: int = 0
    """Hidden units of the head beside its linear part; 0: linear."""

    stand_in_rank: int = 0
    """Rank of the maps of `low_rank` zero experts."""

    paired_temperature: float = 1.0
    """Width of the gate through which a paired head trains (straight-through)."""

    group_loss_coeff: float = 0.0
    """alpha: coefficient of the group-level balancing loss (paper: 0.1). 0 switches it off."""

    moe_zero_expert_weight: float = 2.0
    """w: the group loss is least at a zero share of w*Nz / (N + w*Nz). Variant `adamoe` has no w."""

    group_loss_variant: str = "routed"
    """`routed`: count the slots that were really routed. `authors`: count a fresh top-k of the scores, without
    expert bias, padding included (what the paper's code does). `adamoe`: balance every real expert too, with the zero
    experts as one kind (arXiv 2406.13233; `moe.balancing`); it counts like `routed` and pulls the zero share to
    Nz / (N + Nz). With `renormalize_after_drop` it makes AdaMoE's layer."""

    group_loss_scope: str = "tp_cp"
    """Ranks over which slots are counted: one micro-batch (`tp_cp`) or all data-parallel ones (`tp_dp_cp`)."""

    renormalize_after_drop: bool = False
    """Rescale the weights of the real picks to their sum before the drop. Costs 1.7 points in the paper."""

    @property
    def paired(self) -> bool:
        """Routing is paired, and there are zero experts."""
        return self.zero_expert_routing == "paired" and self.num_zero_experts > 0

    @property
    def score_terms(self) -> tuple[str, ...]:
        """`paired_score`, split."""
        return tuple(self.paired_score.split("+"))

    @property
    def num_zero_rows(self) -> int:
        """Rows added to the router's weight: Nz for shared routing, none for paired."""
        return 0 if self.paired else self.num_zero_experts

    def costs(self, hidden: int, topk: int, expert_width: int) -> tuple[float, float]:
        """Multiply-adds that paired zero experts take beside the experts: the heads', over those of a token's K
        experts; a stand-in's, over those of its expert.

        A gated expert takes 3*H*F, a head N*H + h*(H + N) for all experts of a layer, a stand-in (2*r + 1)*H.
        """
        if not self.paired:
            return 0.0, 0.0
        experts, units = self.num_zero_experts, self.paired_head_width
        head = experts * hidden + units * (hidden + experts) if "head" in self.score_terms else 0
        stand_in = 2 * self.stand_in_rank + 1 if self.zero_experts_type != "zero" else 0
        return head / (3 * topk * hidden * expert_width), stand_in / (3 * expert_width)

    def validate(self, num_moe_experts: int | None, topk: int) -> None:
        """Raise `UserError` naming the flag that cannot work."""
        if num_moe_experts is None:
            raise UserError("zero experts need a Mixture-of-Experts model; this one has no experts")
        if topk > num_moe_experts:
            raise UserError(
                f"--moe-router-topk {topk} is larger than the number of experts, {num_moe_experts}"
            )
        if self.num_zero_experts < 0:
            raise UserError(f"--num-zero-experts {self.num_zero_experts} must not be negative")
        for flag, value, allowed in (
            ("--zero-experts-type", self.zero_experts_type, ZERO_EXPERT_TYPES),
            ("--zero-expert-routing", self.zero_expert_routing, ZERO_EXPERT_ROUTINGS),
            ("--group-loss-variant", self.group_loss_variant, GROUP_LOSS_VARIANTS),
            ("--group-loss-scope", self.group_loss_scope, GROUP_LOSS_SCOPES),
        ):
            if value not in allowed:
                raise UserError(f"{flag} {value!r} is unknown; choose one of {', '.join(allowed)}")
        if self.zero_expert_routing == "paired":
            self._validate_paired(num_moe_experts)
        elif self.zero_experts_type in ("constant", "low_rank"):
            raise UserError(
                f"--zero-experts-type {self.zero_experts_type} needs --zero-expert-routing paired; learned is a "
                "constant of shared zero experts"
            )
        if self.group_loss_coeff:
            if self.num_zero_experts <= 0:
                raise UserError(
                    "the group loss (grouped_aux_loss) needs zero experts: "
                    f"--num-zero-experts is {self.num_zero_experts}, give a positive number"
                )
            if self.moe_zero_expert_weight <= 0:
                raise UserError(f"--moe-zero-expert-weight {self.moe_zero_expert_weight} must be positive")

    def _validate_paired(self, num_moe_experts: int) -> None:
        if self.num_zero_experts not in (0, num_moe_experts):
            raise UserError(
                f"--num-zero-experts {self.num_zero_experts}: paired routing has one zero expert per real one, "
                f"{num_moe_experts}; leave the flag out"
            )
        if self.zero_experts_type not in PAIRED_TYPES:
            raise UserError(
                f"--zero-experts-type {self.zero_experts_type} is not supported with paired routing"
            )
        for flag, value in (
            ("--paired-head-width", self.paired_head_width),
            ("--stand-in-rank", self.stand_in_rank),
        ):
            if value < 0:
                raise UserError(f"{flag} {value} must not be negative")
        if (self.stand_in_rank > 0) != (self.zero_experts_type == "low_rank"):
            raise UserError(
                f"--stand-in-rank {self.stand_in_rank} does not fit --zero-experts-type {self.zero_experts_type}: "
                "low_rank has a rank of at least 1, others have none"
            )
        unknown = [term for term in self.score_terms if term not in SCORE_TERMS]
        if unknown or len(set(self.score_terms)) != len(self.score_terms):
            raise UserError(
                f"--paired-score {self.paired_score!r} is unknown; join some of {', '.join(SCORE_TERMS)} with '+'"
            )
        if not self.paired_temperature > 0:
            raise UserError(f"--paired-temperature {self.paired_temperature} must be positive")
        if self.group_loss_coeff:
            raise UserError(
                "the group loss (grouped_aux_loss) steers shared zero experts; with paired routing use "
                "--moe-router-load-balancing-type none and --target-zero-share"
            )

    def target_share(self, num_moe_experts: int) -> float:
        """Zero share at which the group loss is least: w*Nz / (N + w*Nz), with w = 1 for the variant `adamoe`."""
        weight = 1.0 if self.group_loss_variant == "adamoe" else self.moe_zero_expert_weight
        weighted = weight * self.num_zero_experts
        return weighted / (num_moe_experts + weighted)
