"""Settings of a Megatron config that zero experts cannot live with."""

from __future__ import annotations

from ..config.zero_experts import ZeroExpertConfig
from ..errors import UserError


def refuse_conflicts(config, zero: ZeroExpertConfig) -> None:
    """Raise `UserError` for settings of a Megatron config that zero experts, if any, cannot live with."""
    if not zero.num_zero_experts:
        return
    if config.moe_expert_capacity_factor is not None:
        raise UserError(
            "--moe-expert-capacity-factor cannot be combined with zero experts (dropless routing only)"
        )
    for kind in per_expert_losses(config):
        raise UserError(
            f"--moe-router-load-balancing-type {kind} treats zero experts like real ones and pulls their share "
            "to Nz/(N+Nz); use grouped_aux_loss, or --moe-aux-loss-coeff 0"
        )
    if config.moe_router_enable_expert_bias and config.moe_router_bias_update_rate:
        raise UserError(
            "--moe-router-bias-update-rate must be 0 with zero experts: bias updates work against the group loss"
        )


def per_expert_losses(config) -> list[str]:
    """Megatron's own losses on routing that this config asks for."""
    kinds = config.moe_router_load_balancing_type
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    coeffs = config.moe_aux_loss_coeff
    coeffs = list(coeffs) if isinstance(coeffs, (list, tuple)) else [coeffs] * len(kinds)
    return [kind for kind, coeff in zip(kinds, coeffs) if kind not in ("none", "grouped_aux_loss") and coeff]


def only_megatron_does(config) -> bool:
    """Whether routing has parts that are Megatron's alone: losses per expert, a capacity, updates of the score bias."""
    updates = config.moe_router_enable_expert_bias and config.moe_router_bias_update_rate
    return bool(per_expert_losses(config) or config.moe_expert_capacity_factor is not None or updates)
