"""The router of a dynamic MoE layer: top-k over N real and Nz zero experts, zero slots dropped."""

from __future__ import annotations

import copy

import torch
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    router_gating_linear,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter

from ..config.zero_experts import ZeroExpertConfig
from ..errors import UserError
from .balancing import RoutedSlots, group_loss, null_expert_loss
from .group_limit import LimitedPicks, limit_of
from .paired import PairedZeroExperts
from .pick_rules import Piggyback, apply_pick_rule
from .replay import RoutingReplay
from .router_dials import RouterDials
from .stand_ins import zero_output
from .stats import RoutingStats


class ZeroExpertRouter(TopKRouter):
    """Megatron's top-k router, widened by Nz zero experts and sliced back to the N real ones.

    The rest of the MoE layer never learns of the zero experts: it gets probabilities and a routing map of shape
    [T, N] in which slots that chose a zero expert are simply missing. Their weight is not given to the others
    (arXiv 2605.18643, Table 6).

    Attributes:
        dials: mask, pick rule, w and the like; only `router_dials` sets them.
        limit: groups of experts that a token may choose from, or None.
        paired: scores of paired zero experts, or None (shared routing).
        in_mtp_head: its layer is that of a multi-token-prediction head, behind the decoder's.
        routing_stats: counts since the last reset.
        router_replay: `replay.RoutingReplay` (or Megatron's) that fixes or records the picks, or None. The masked
            model, which is the teacher, routes freely.
    """

    def __init__(self, config, pg_collection=None, *, zero: ZeroExpertConfig, **kwargs):
        zero.validate(config.num_moe_experts, config.moe_router_topk)
        refuse_conflicts(config, zero)
        wide = copy.copy(config)
        wide.num_moe_experts = config.num_moe_experts + zero.num_zero_rows
        # Without zero experts what Megatron alone does stays; it must not run its per-expert losses over zero experts.
        self._stock = not zero.num_zero_experts and only_megatron_does(config)
        if not self._stock:
            wide.moe_router_load_balancing_type, wide.moe_aux_loss_coeff = "none", 0.0
        super().__init__(config=wide, pg_collection=pg_collection, **kwargs)
        self.zero = zero
        self.num_real, self.num_zero = config.num_moe_experts, zero.num_zero_rows
        self.limit = limit_of(config, self.num_real)
        self.dials = RouterDials(zero_weight=zero.moe_zero_expert_weight)
        self.routing_stats = RoutingStats()
        self.in_mtp_head = False
        self.zero_output = zero_output(zero, config)
        self.paired = None
        if zero.paired:
            self.paired = PairedZeroExperts(
                zero, config.hidden_size, config.params_dtype, config.sequence_parallel
            )
            self._hidden_TH: torch.Tensor | None = None

    def _apply(self, fn, recurse=True):
        """Move with the model, but let no cast round the score bias, which is float32 whatever the model's type."""
        exact = self.expert_bias
        super()._apply(fn, recurse)
        if exact is not None and not exact.is_meta:
            self.expert_bias = exact.to(self.expert_bias.device)
        return self

    @property
    def group_loss_ranks(self) -> int:
        """Ranks whose parts add up to one group loss."""
        return (self.tp_dp_cp_group if self.zero.group_loss_scope == "tp_dp_cp" else self.tp_cp_group).size()

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """[S, B, H] -> logits [S, B, N+Nz]; [S, B, N] with the mask on, where zero rows are not multiplied at
        all: a wider GEMM may round differently."""
        if self.paired is not None:
            if self.dials.zero_mask:
                self.paired.pass_masked()
            else:
                self._hidden_TH = input.reshape(-1, input.shape[-1])
        if not self.dials.zero_mask or self.num_zero == 0:
            logits = super().gating(input)
            if self.dials.zero_logit_bias and self.num_zero:
                logits[..., self.num_real :] += self.dials.zero_logit_bias
            return logits
        dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(self.config.moe_router_dtype, input.dtype)
        bias = None if self.bias is None else self.bias[: self.num_real]
        return router_gating_linear(input, self.weight[: self.num_real], bias, dtype)

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None):
        """Route. logits [S, B, E] with E = N+Nz (N with the mask on); padding_mask True = padding.

        Returns:
            probs [T, N] and map [T, N] (bool) of the real experts.
        """
        masked, logits_TE = self.dials.zero_mask, logits.reshape(-1, logits.shape[-1])
        padding_T = self._local_padding(padding_mask, logits_TE.shape[0])
        rule = self.dials.pick_rule
        if isinstance(rule, Piggyback):
            if self.expert_bias is not None or self.limit is not None:
                raise UserError(
                    "--moe-pick-rule oea: this model's routers choose by more than their logits (a score bias, "
                    "groups); use topk, skip or top_p"
                )
            logits_TE = rule.limit(logits_TE, None if padding_T is None else ~padding_T)
            logits = logits_TE.view_as(logits)
        if self._stock:
            probs_TE, map_TE = super().routing(logits, padding_T)
        else:
            probs_TE, map_TE = self._pick(self.apply_z_loss(logits_TE, padding_mask=padding_T))
        probs_TN, map_TN = probs_TE[:, : self.num_real].contiguous(), map_TE[:, : self.num_real].contiguous()
        if self.zero.renormalize_after_drop:
            total = probs_TE.sum(1, keepdim=True)
            probs_TN = probs_TN * (total / probs_TN.sum(1, keepdim=True).clamp(min=1e-20))
        if self.zero_output is not None and self.paired is None and not masked:
            self.zero_output.hand_over(probs_TE[:, self.num_real :])
        if rule is not None:
            probs_TN, map_TN = apply_pick_rule(rule, probs_TN, map_TN, self.topk)
        learning = self.training and torch.is_grad_enabled()
        counting = learning or not self.training  # the first pass of a recomputed block counts nothing
        valid_T = None if padding_T is None else ~padding_T
        kept_TN = map_TN
        if self.paired is not None and not masked:
            probs_TN, map_TN, kept_TN = self._hand_to_pairs(probs_TN, map_TN, valid_T, counting)
        if counting:
            self.routing_stats.count(kept_TN.sum(1), valid_T, self.topk)
            self.routing_stats.add_picks(map_TE[:, : self.num_real], kept_TN, valid_T)
        if learning and self.zero.group_loss_coeff and not masked:
            probs_TN = self._attach_group_loss(probs_TN, logits_TE, map_TE, padding_T)
        return probs_TN, map_TN

    def _pick(self, logits_TE: torch.Tensor):
        """Probabilities and map [T, E] of the K picks over real and zero experts."""
        bias, replay = self.expert_bias, None if self.dials.zero_mask else self.router_replay
        if isinstance(replay, RoutingReplay):
            replay.begin(self.training)
        return topk_routing_with_score_function(
            logits_TE,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=None if bias is None else bias[: logits_TE.shape[1]],
            fused=self.config.moe_router_fusion and self.limit is None,
            router_replay=replay if self.limit is None else LimitedPicks(self.limit, replay),
        )

    def _hand_to_pairs(self, probs_TN, map_TN, valid_T, counting: bool):
        """Paired routing: (probs, map) for the dispatcher and the map of picks that real experts keep."""
        hidden_TH, self._hidden_TH = self._hidden_TH, None
        score_TN = self.paired.scores(hidden_TH, probs_TN)
        if counting:
            self.routing_stats.add_scores(score_TN, map_TN, valid_T)
        kept_TN = self.paired.kept(score_TN, map_TN)
        if isinstance(self.router_replay, RoutingReplay):
            kept_TN = self.router_replay.kept(kept_TN)
        probs, dispatched_TN, gate_TN = self.paired.thin_out(score_TN, probs_TN, map_TN, kept_TN)
        if self.zero_output is not None:
            # Where a head trains, kept picks have weight 0 here, and a gradient.
            answered_TN = map_TN if gate_TN is not None else map_TN & ~kept_TN
            self.zero_output.hand_over(probs_TN - probs, answered_TN)
        if gate_TN is not None and torch.is_grad_enabled() and self.dials.sparsity_coeff:
            probs = self._attach_sparsity_loss(probs, gate_TN, map_TN, valid_T)
        return probs, dispatched_TN, kept_TN

    def _attach_sparsity_loss(self, probs_TN, gate_TN, map_TN, valid_T):
        """Attach coefficient * mean gate over this micro-batch's picks (BEAM's regulariser)."""
        weight_TN = map_TN.float() if valid_T is None else map_TN.float() * valid_T[:, None]
        sums = torch.stack([(gate_TN * weight_TN).sum(), weight_TN.sum()])
        total, tokens = sums[1].detach().clone(), sums[1].detach() / self.topk
        if self.tp_cp_group.size() > 1:
            torch.distributed.all_reduce(total, group=self.tp_cp_group)
        part = self.dials.loss_factor * self.dials.sparsity_coeff * sums[0] / total.clamp(min=1)
        if self.calculate_per_token_loss:
            part = part * tokens * self.tp_cp_group.size()
        return MoEAuxLossAutoScaler.apply(probs_TN, part)

    def _attach_group_loss(self, probs_TN, logits_TE, map_TE, padding_T):
        if self.zero.group_loss_variant == "authors":
            routed = RoutedSlots.count_fresh(logits_TE, self.topk, self.score_function)
        else:
            routed = RoutedSlots.count(logits_TE, map_TE, padding_T, self.score_function)
        counts = torch.cat([routed.slots_E, routed.tokens[None]]).float()
        group = self.tp_dp_cp_group if self.zero.group_loss_scope == "tp_dp_cp" else self.tp_cp_group
        if group.size() > 1:
            torch.distributed.all_reduce(counts, group=group)
        part = self._balance(counts[:-1], counts[-1], routed.scores_TE)
        self.routing_stats.add_group_loss(part, counts[-1])
        part = part * self.zero.group_loss_coeff * self.dials.loss_factor
        if self.zero.group_loss_scope == "tp_dp_cp":
            # Data-parallel gradients are averaged, so each rank's part counts once per data-parallel rank.
            part = part * (group.size() / self.tp_cp_group.size())
        if self.calculate_per_token_loss:
            # Gradients are divided by the number of tokens later; undo it, over the ranks of the loss.
            part = part * routed.tokens * self.tp_cp_group.size()
        return MoEAuxLossAutoScaler.apply(probs_TN, part)

    def _balance(self, slots_E, tokens, scores_TE):
        """This rank's part of the loss, from the slots and tokens of all ranks of its group."""
        if self.zero.group_loss_variant == "adamoe":
            return null_expert_loss(slots_E, tokens, scores_TE, self.num_real)
        real, zero = slots_E[: self.num_real].sum(), slots_E[self.num_real :].sum()
        return group_loss(real, zero, tokens, scores_TE, self.num_real, self.num_zero, self.dials.zero_weight)

    def _local_padding(self, padding_mask, num_tokens: int):
        """Flatten [S, B] to [T]; take this rank's part where Megatron handed over the whole sequence.

        Megatron scatters the mask on the first pipeline stage only.
        """
        if padding_mask is None:
            return None
        flat = padding_mask.reshape(-1)
        if flat.numel() == num_tokens:
            return flat
        ranks = self.tp_group.size()
        if flat.numel() != num_tokens * ranks:
            raise ValueError(f"padding mask has {flat.numel()} entries for {num_tokens} tokens")
        return flat.chunk(ranks)[self.tp_group.rank()]


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
