"""Qwen3-MoE with zero experts for transformers >= 5.0; travels with checkpoints, needs no other package.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Each MoE layer routes over N real and Nz zero experts: softmax over the K best of N+Nz logits, then slots
that chose a zero expert are dropped. Their weight is not given to the others; nothing is computed for them.

config.json: `zce_nums` [Nz], `zce_types` ["zero" | "copy" | "learned"], `use_zce_mask` (True: route over the
N real experts only, which is the static model). `model_type` stays `qwen3_moe`, so that transformers merges
the per-expert weights on loading as for the stock model.

transformers looks for the text `@use_experts_implementation` in this file before it lets a user choose
`experts_implementation`: here "eager" means a loop over experts, everything else one grouped product.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeForCausalLM,
    Qwen3MoeSparseMoeBlock,
    Qwen3MoeTopKRouter,
)

KINDS = ("zero", "copy", "learned")


def zero_experts(config) -> tuple[int, str]:
    """Number and kind of zero experts that a config asks for; `ValueError` where that makes no sense."""
    counts = getattr(config, "zce_nums", None)
    kinds = getattr(config, "zce_types", None) or ["zero"]
    if not counts:
        raise ValueError("config.json has no zce_nums: a model with zero experts needs e.g. [64]")
    if len(counts) != len(kinds) or len(set(kinds)) != 1 or kinds[0] not in KINDS:
        raise ValueError(
            f"zce_nums {counts} with zce_types {kinds} is not supported; one kind of {KINDS} per model"
        )
    return sum(counts), kinds[0]


class ZeroExpertRouter(Qwen3MoeTopKRouter):
    """Router with N+Nz rows, zero experts last.

    Attributes:
        masked: route over the N real experts; the zero rows are not even multiplied.
    """

    def __init__(self, config):
        super().__init__(config)
        self.num_zero, self.kind = zero_experts(config)
        self.masked = bool(getattr(config, "use_zce_mask", False))
        self.weight = nn.Parameter(torch.empty(self.num_experts + self.num_zero, self.hidden_dim))
        nn.init.normal_(self.weight, std=config.initializer_range)
        if self.kind == "learned":
            self.zero_bias = nn.Parameter(torch.zeros(self.num_zero, self.hidden_dim))

    def forward(self, hidden_TH):
        """[T, H] -> logits [T, N+Nz] (masked: [T, N]), weights [T, K], ids [T, K]; ids >= N are zero."""
        logits = F.linear(hidden_TH, self.weight[: self.num_experts] if self.masked else self.weight)
        weights, ids = torch.topk(F.softmax(logits, dtype=torch.float, dim=-1), self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights.to(logits.dtype), ids


class ZeroExpertMoeBlock(nn.Module):
    """MoE layer that computes the real slots only. Takes over the stock block's experts.

    Attributes:
        static_shapes: never ask the device how many slots are real (CUDA graphs, torch.compile). Rows of zero
            slots are then moved, but still left out of the products.
    """

    def __init__(self, config, experts):
        super().__init__()
        self.config = config
        self.gate = ZeroExpertRouter(config)
        self.experts = experts
        self.static_shapes = False
        self.token_mask_BS = None
        self.reset_counts()

    def reset_counts(self):
        self.zero_slots, self.all_slots = 0, 0

    def forward(self, hidden_BSH):
        """[B, S, H] -> [B, S, H]."""
        hidden_TH = hidden_BSH.reshape(-1, hidden_BSH.shape[-1])
        _, weights_TK, ids_TK = self.gate(hidden_TH)
        if self.gate.masked:
            return self.experts(hidden_TH, ids_TK, weights_TK).view_as(hidden_BSH)
        static = self.static_shapes or _shapes_must_be_static()
        zero_TK = ids_TK >= self.gate.num_experts
        if not static:
            self._count(zero_TK, hidden_BSH.shape)
        output_TH = self._real_slots(hidden_TH, weights_TK, ids_TK, static)
        if self.gate.kind == "copy":
            output_TH = output_TH + (weights_TK * zero_TK).sum(dim=-1, keepdim=True) * hidden_TH
        elif self.gate.kind == "learned":
            bias_TKH = self.gate.zero_bias[(ids_TK - self.gate.num_experts).clamp(min=0)]
            output_TH = output_TH + ((weights_TK * zero_TK).unsqueeze(-1) * bias_TKH).sum(dim=1)
        return output_TH.to(hidden_TH.dtype).view_as(hidden_BSH)

    def _real_slots(self, hidden_TH, weights_TK, ids_TK, static):
        num_real, top_k = self.gate.num_experts, ids_TK.shape[1]
        group_S = ids_TK.reshape(-1).clamp(max=num_real)  # all zero slots form one last group
        order_R = group_S.argsort(stable=True)
        counts = torch.zeros(num_real + 1, dtype=torch.int64, device=group_S.device)
        ends_N = counts.scatter_add_(0, group_S, torch.ones_like(group_S)).cumsum(0)[:num_real]
        if not static:
            order_R = order_R[: int(ends_N[-1])]
        output_TH = torch.zeros_like(hidden_TH)
        if order_R.numel() == 0:
            return output_TH
        token_R = order_R // top_k
        rows_RH = self._experts(hidden_TH[token_R], ends_N, static)
        rows_RH = rows_RH * weights_TK.reshape(-1)[order_R].unsqueeze(-1)
        if static:
            is_real_R = torch.arange(order_R.numel(), device=order_R.device) < ends_N[-1]
            rows_RH = torch.where(
                is_real_R.unsqueeze(-1), rows_RH, 0
            )  # rows behind the last group hold garbage
        return output_TH.index_add_(0, token_R, rows_RH.to(output_TH.dtype))

    def _experts(self, rows_RH, ends_N, static):
        """Gated MLP of expert n on rows ends[n-1]:ends[n]; rows behind the last end are not computed."""
        gate_up, down, act = self.experts.gate_up_proj, self.experts.down_proj, self.experts.act_fn
        if static or self._use_grouped_mm(rows_RH):
            ends = ends_N.to(torch.int32)
            gate_RF, up_RF = F.grouped_mm(rows_RH, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
            return F.grouped_mm(act(gate_RF) * up_RF, down.transpose(1, 2), offs=ends)
        parts, start = [], 0
        for expert, end in enumerate(ends_N.tolist()):
            if end > start:
                gate_RF, up_RF = F.linear(rows_RH[start:end], gate_up[expert]).chunk(2, dim=-1)
                parts.append(F.linear(act(gate_RF) * up_RF, down[expert]))
            start = end
        return torch.cat(parts)

    def _use_grouped_mm(self, rows_RH):
        if getattr(self.config, "_experts_implementation", None) == "eager" or not hasattr(F, "grouped_mm"):
            return False
        weights = (self.experts.gate_up_proj, self.experts.down_proj)
        if any(
            w.dtype != rows_RH.dtype or w.data_ptr() % 16 or w.shape[-1] * w.itemsize % 16 for w in weights
        ):
            return False  # the kernel wants rows that start on 16 bytes
        return not rows_RH.is_cuda or torch.cuda.get_device_capability(rows_RH.device) >= (8, 0)

    def _count(self, zero_TK, shape):
        mask = self.token_mask_BS
        if mask is not None and mask.shape[0] == shape[0] and mask.shape[1] >= shape[1]:
            token_T = mask[:, -shape[1] :].reshape(-1).to(zero_TK.device).bool()
            self.zero_slots = self.zero_slots + (zero_TK & token_T.unsqueeze(-1)).sum()
            self.all_slots = self.all_slots + token_T.sum() * zero_TK.shape[1]
        else:
            self.zero_slots = self.zero_slots + zero_TK.sum()
            self.all_slots = self.all_slots + zero_TK.numel()


def _shapes_must_be_static():
    return torch.compiler.is_compiling() or (
        torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    )


class Qwen3MoePlusPlusForCausalLM(Qwen3MoeForCausalLM):
    """Stock Qwen3-MoE whose MoE blocks skip zero experts; `ValueError` for a config without `zce_nums`."""

    def __init__(self, config):
        num_zero, _ = zero_experts(config)
        super().__init__(config)
        if not getattr(config, "use_zce_mask", False):
            self.num_experts = config.num_experts + num_zero  # columns of the router logits
        for layer in self.model.layers:
            if isinstance(layer.mlp, Qwen3MoeSparseMoeBlock):
                layer.mlp = ZeroExpertMoeBlock(config, layer.mlp.experts)
        self.model.register_forward_pre_hook(self._pass_padding_mask, with_kwargs=True)

    def moe_blocks(self) -> list[ZeroExpertMoeBlock]:
        """MoE blocks in layer order (dense layers have none)."""
        return [layer.mlp for layer in self.model.layers if isinstance(layer.mlp, ZeroExpertMoeBlock)]

    def _pass_padding_mask(self, module, args, kwargs):
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        usable = isinstance(mask, torch.Tensor) and mask.dim() == 2
        for block in self.moe_blocks():
            block.token_mask_BS = mask if usable else None

    def set_zero_mask(self, on: bool) -> None:
        """True: route over the real experts only, as the static model does."""
        for block in self.moe_blocks():
            block.gate.masked = on
        self.num_experts = self.config.num_experts + (0 if on else zero_experts(self.config)[0])

    def zero_share(self) -> list[float]:
        """Per MoE layer: slots that chose a zero expert / all slots, padding excluded, since the last reset.

        0.0 where nothing was counted (mask on, CUDA graph, torch.compile).
        """
        return [int(block.zero_slots) / max(int(block.all_slots), 1) for block in self.moe_blocks()]

    def reset_zero_share(self) -> None:
        """Start counting anew."""
        for block in self.moe_blocks():
            block.reset_counts()
