"""Options of the model and its zero experts. Each field is a flag and a YAML key (see `config/arguments.py`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from .arguments import Amount, Whole
from .lora import LoRA
from .zero_experts import (
    GROUP_LOSS_SCOPES,
    GROUP_LOSS_VARIANTS,
    ZERO_EXPERT_ROUTINGS,
    ZERO_EXPERT_TYPES,
    ZeroExpertConfig,
)


@dataclass(frozen=True)
class ModelOptions:
    """The model and its zero experts."""

    stage: Literal["pretrain", "0", "1", "2", "eval"] = "1"
    """What to run. `pretrain`: no teacher, cross-entropy. `0`: the teacher answers prompts. `1`: distillation on
    its answers. `2`: distillation on the student's own answers, sampled as it trains. `eval`: nothing trains; the
    checkpoint is measured against its teacher on --eval-data-path."""

    hf_config: str | None = None
    """Folder of the HF model (config.json gives the architecture). Default: hf_config/ of the checkpoint."""

    pretrained_checkpoint: str | None = None
    """Megatron checkpoint to start from (from zeda convert). None: random weights."""

    num_zero_experts: Whole | None = None
    """Nz. Default: as many as the checkpoint has."""

    zero_experts_type: Literal[ZERO_EXPERT_TYPES] | None = None
    """zero, copy or learned; paired ones zero, constant or low_rank (from a fit). Default: as the checkpoint has it."""

    zero_expert_routing: Literal[ZERO_EXPERT_ROUTINGS] | None = None
    """shared (the paper's zero experts) or paired (one per real expert). Default: as the checkpoint."""

    paired_score: str | None = None
    """Terms of a pick's score under paired routing, joined by '+': weight, head, residual. Default: as the
    checkpoint, else all three."""

    paired_temperature: float = 1.0
    """Width of the gate through which a paired head trains."""

    moe_zero_expert_weight: float = 2.0
    """w: the group loss is least at a zero share of w*Nz/(N+w*Nz). The variant adamoe has no w."""

    moe_router_load_balancing_type: Literal["grouped_aux_loss", "aux_loss", "seq_aux_loss", "none"] = (
        "grouped_aux_loss"
    )
    """grouped_aux_loss (shared zero experts; paired ones have no such loss), aux_loss or seq_aux_loss (static
    models), none."""

    moe_aux_loss_coeff: Amount = 0.1
    """Coefficient of that loss (alpha)."""

    moe_router_bias_update_rate: Amount = 0.0
    """Step of the score bias towards experts that get fewer tokens (stage pretrain of a static model with such a bias,
    beside aux_loss or seq_aux_loss). 0 freezes it."""

    group_loss_variant: Literal[GROUP_LOSS_VARIANTS] = "routed"
    """routed: count real slots. authors: count as the paper's code does. adamoe: AdaMoE's loss, which balances every
    real expert too (use it with --renormalize-after-drop); it pulls the share to Nz/(N+Nz)."""

    group_loss_scope: Literal[GROUP_LOSS_SCOPES] = "tp_cp"
    """tp_cp: slots of one micro-batch. tp_dp_cp: of all data-parallel ranks."""

    renormalize_after_drop: bool = False
    """Rescale the real weights after dropping zero slots (for study; costs quality)."""

    moe_pick_rule: str | None = None
    """Thin out the student's picks: topk=2 (NET), skip=0.4, top_p=0.7, each with optional ',renormalize'."""

    expert_backend: Literal["auto", "kernels", "grouped_mm", "loop"] = "auto"
    """Product of the local experts: auto, kernels (kernels/README.md), grouped_mm, loop."""

    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """alltoall, allgather, or flex (DeepEP's kernels; GPUs)."""

    moe_flex_dispatcher_backend: Literal["deepep", "hybridep"] = "deepep"
    """deepep or hybridep."""

    moe_permute_fusion: bool = False
    """Sort rows by expert with Transformer Engine's fused kernels (GPUs)."""

    trainable: Literal["all", "router", "router+norms", "lora", "mtp"] = "all"
    """What trains: all, router (Router-KD, arXiv 2603.02217), router+norms (and the weights of all norms), lora
    (routers, and low-rank adapters beside all other weights) or mtp (the head of multi-token prediction alone, see
    --mtp-loss-scale). The rest stays bit for bit what it is, and is in no checkpoint but the one it came from."""

    lora_rank: Whole = LoRA.rank
    """Rank of the adapters."""

    lora_alpha: Amount = LoRA.alpha
    """Over the rank, the factor of an adapter's output."""

    lora_targets: str = LoRA.targets
    """What has adapters: attention, experts, shared (shared experts and dense MLPs), joined by '+'."""

    bf16: bool = False
    """bfloat16 weights and activations with fp32 master weights; otherwise fp32."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """None, full or selective activation recomputation."""

    @property
    def lora(self) -> LoRA | None:
        """The adapters of this run; None unless they train."""
        if self.trainable != "lora":
            return None
        return LoRA(self.lora_rank, self.lora_alpha, self.lora_targets)

    def zero(self, base: ZeroExpertConfig) -> ZeroExpertConfig:
        """These zero experts, with what steers them in this run."""
        shared = base.zero_expert_routing == "shared"
        grouped = self.moe_router_load_balancing_type == "grouped_aux_loss" and shared
        return replace(
            base,
            paired_score=self.paired_score or base.paired_score,
            paired_temperature=self.paired_temperature,
            group_loss_coeff=self.moe_aux_loss_coeff if grouped else 0.0,
            moe_zero_expert_weight=self.moe_zero_expert_weight,
            group_loss_variant=self.group_loss_variant,
            group_loss_scope=self.group_loss_scope,
            renormalize_after_drop=self.renormalize_after_drop,
        )
