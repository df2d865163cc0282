"""GLM-4.7-Flash with zero experts for transformers >= 5.23; travels with checkpoints, needs no other package.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Each MoE layer routes over N real and Nz zero experts: sigmoid scores, the K best by score + bias, weights = score /
sum of the K, times routed_scaling_factor. Slots that chose a zero expert are then dropped: their weight is not given to
the others, nothing is computed for them. The shared expert is added as usual.

config.json: `zce_nums` [Nz], `zce_types` ["zero"], `use_zce_mask` (True: the N real experts only, which is the static
model), `zce_logit_bias` (compute dial, added to the logits of the zero experts). `model_type` stays `glm4_moe_lite`,
so that transformers merges the per-expert weights as for the stock model. Multi-token-prediction layers are ignored.
transformers looks for `@use_experts_implementation` in this text before it lets a user choose
`experts_implementation`: "eager" means a loop over experts, everything else one grouped product.
"""

import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.glm4_moe_lite.modeling_glm4_moe_lite import (
    Glm4MoeLiteForCausalLM,
    Glm4MoeLiteMoE,
    Glm4MoeLiteTopkRouter,
)


def zero_experts(config) -> int:
    """Nz that a config asks for; `ValueError` where that makes no sense."""
    counts, kinds, routing = (getattr(config, key, None) for key in ("zce_nums", "zce_types", "zce_routing"))
    if not counts:
        raise ValueError("config.json has no zce_nums: a model with zero experts needs e.g. [32]")
    if (kinds or ["zero"]) != ["zero"] * len(counts) or routing not in (None, "shared"):
        asked = f"zce_nums {counts} with zce_types {kinds} and zce_routing {routing}"
        raise ValueError(f"{asked} is not supported here: shared zero experts of type zero only")
    return sum(counts)


class ZeroExpertRouter(Glm4MoeLiteTopkRouter):
    """Router with N+Nz rows, zero experts last. With `masked` the zero rows are not even multiplied; `logit_bias` is
    added to the logits of the zero experts."""

    def __init__(self, config):
        super().__init__(config)
        rows = self.num_experts + zero_experts(config)
        self.masked = bool(getattr(config, "use_zce_mask", False))
        self.logit_bias = 0.0
        self.weight = nn.Parameter(torch.zeros(rows, self.hidden_dim, dtype=torch.float32))
        self.e_score_correction_bias = nn.Buffer(torch.zeros(rows, dtype=torch.float32))

    def forward(self, hidden_states):
        """[T, H] -> logits [T, N+Nz] (masked: [T, N]), weights [T, K], ids [T, K]; ids >= N are zero."""
        hidden_TH = hidden_states.view(-1, self.hidden_dim)
        rows = self.num_experts if self.masked else self.weight.shape[0]
        logits = F.linear(hidden_TH.float(), self.weight[:rows].float())
        if self.logit_bias and not self.masked:
            real, zero = logits.split([self.num_experts, rows - self.num_experts], dim=-1)
            logits = torch.cat([real, zero + self.logit_bias], dim=-1)
        scores = logits.sigmoid()
        ids = torch.topk(scores + self.e_score_correction_bias[:rows], self.top_k, dim=-1, sorted=False)[1]
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * self.routed_scaling_factor
        return logits, weights, ids


class ZeroExpertMoeBlock(nn.Module):
    """MoE layer that computes the real slots only. With `static_shapes` it never asks the device how many are real
    (CUDA graphs, torch.compile): rows of zero slots are then moved, but still left out of the products."""

    def __init__(self, config, stock):
        super().__init__()
        self.config = config
        self.gate = ZeroExpertRouter(config)
        self.experts, self.shared_experts = stock.experts, stock.shared_experts
        self.static_shapes, self.token_mask_BS = False, None
        self.reset_counts()

    def reset_counts(self):
        self.zero_slots, self.all_slots = 0, 0

    def forward(self, hidden_BSH):
        """[B, S, H] -> [B, S, H]."""
        hidden_TH = hidden_BSH.view(-1, hidden_BSH.shape[-1])
        _, weights_TK, ids_TK = self.gate(hidden_TH)
        routed = self.experts if self.gate.masked else partial(self._real_slots, shape=hidden_BSH.shape)
        return routed(hidden_TH, ids_TK, weights_TK).view_as(hidden_BSH) + self.shared_experts(hidden_BSH)

    def _real_slots(self, hidden_TH, ids_TK, weights_TK, shape):
        num_real, static = self.gate.num_experts, self.static_shapes or _shapes_must_be_static()
        if not static:
            self._count(ids_TK >= num_real, shape)
        group_S = ids_TK.reshape(-1).clamp(max=num_real)  # all zero slots form one last group
        order_R = group_S.argsort(stable=True)
        counts = torch.zeros(num_real + 1, dtype=torch.int64, device=group_S.device)
        ends_N = counts.scatter_add_(0, group_S, torch.ones_like(group_S)).cumsum(0)[:num_real]
        if not static:
            order_R = order_R[: int(ends_N[-1])]
        output_TH = torch.zeros_like(hidden_TH)
        if order_R.numel() == 0:
            return output_TH
        token_R = order_R // ids_TK.shape[1]
        rows_RH = self._experts(hidden_TH[token_R], ends_N, static)
        rows_RH = rows_RH * weights_TK.reshape(-1)[order_R].unsqueeze(-1)
        if static:  # rows behind the last group hold garbage
            is_real_R = torch.arange(order_R.numel(), device=order_R.device) < ends_N[-1]
            rows_RH = torch.where(is_real_R.unsqueeze(-1), rows_RH, 0)
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
        for weight in (self.experts.gate_up_proj, self.experts.down_proj):  # rows must start on 16 bytes
            if (
                weight.dtype != rows_RH.dtype
                or weight.data_ptr() % 16
                or weight.shape[-1] * weight.itemsize % 16
            ):
                return False
        return not rows_RH.is_cuda or torch.cuda.get_device_capability(rows_RH.device) >= (8, 0)

    def _count(self, zero_TK, shape):
        mask = self.token_mask_BS
        if mask is not None and mask.shape[0] == shape[0] and mask.shape[1] >= shape[1]:
            token_T = mask[:, -shape[1] :].reshape(-1).to(zero_TK.device).bool()
            zero_TK, tokens = zero_TK & token_T.unsqueeze(-1), token_T.sum()
        else:
            tokens = zero_TK.shape[0]
        self.zero_slots = self.zero_slots + zero_TK.sum()
        self.all_slots = self.all_slots + tokens * zero_TK.shape[1]


def _shapes_must_be_static():
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return torch.compiler.is_compiling() or capturing


class Glm4MoeLitePlusPlusForCausalLM(Glm4MoeLiteForCausalLM):
    """Stock GLM-4.7-Flash whose MoE blocks skip zero experts; `ValueError` for a config that makes no sense."""

    def __init__(self, config):
        zero_experts(config)
        super().__init__(config)
        for layer in self.model.layers:
            if isinstance(layer.mlp, Glm4MoeLiteMoE):
                layer.mlp = ZeroExpertMoeBlock(config, layer.mlp)
        self.model.register_forward_pre_hook(self._pass_padding_mask, with_kwargs=True)
        layers, more = config.num_hidden_layers, getattr(config, "num_nextn_predict_layers", None) or 0
        ignored = {rf"model\.layers\.{layers + i}\..*" for i in range(more)}
        self._keys_to_ignore_on_load_unexpected = ignored | set(self._keys_to_ignore_on_load_unexpected or ())
        if getattr(config, "zce_logit_bias", None) is not None:
            self.set_zero_logit_bias(config.zce_logit_bias)

    def moe_blocks(self) -> list[ZeroExpertMoeBlock]:
        """MoE blocks in layer order (dense layers have none)."""
        return [layer.mlp for layer in self.model.layers if isinstance(layer.mlp, ZeroExpertMoeBlock)]

    def _pass_padding_mask(self, module, args, kwargs):
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        for block in self.moe_blocks():
            block.token_mask_BS = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None

    def set_zero_mask(self, on: bool) -> None:
        """True: route over the real experts only, as the static model does."""
        for block in self.moe_blocks():
            block.gate.masked = on

    def set_zero_logit_bias(self, value: float) -> None:
        """Compute dial: a finite number for the logits of the zero experts; `save_pretrained` keeps it."""
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"zce_logit_bias {value!r} is not a finite number")
        for block in self.moe_blocks():
            block.gate.logit_bias = torch.tensor(float(value), dtype=torch.float32, device="cpu").item()
        self.config.zce_logit_bias = value

    def zero_share(self) -> list[float]:
        """Per MoE layer: zero slots / all slots, padding excluded, since the last reset (0.0: none were counted)."""
        return [int(block.zero_slots) / max(int(block.all_slots), 1) for block in self.moe_blocks()]

    def reset_zero_share(self) -> None:
        """Start counting anew."""
        for block in self.moe_blocks():
            block.reset_counts()
