"""Qwen3-MoE with zero experts for transformers >= 5.0; travels with checkpoints, needs no other package.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Shared routing: each MoE layer routes over N real and Nz zero experts: softmax over the K best of N+Nz logits,
then slots that chose a zero expert are dropped. Paired routing: each of the N experts has a zero expert of its
own, which takes the picks whose score (log of the predicted relative contribution) is below a threshold. Either
way the weight of a dropped slot is not given to the others, and nothing is computed for it.

config.json: `zce_nums` [Nz], `zce_types` ["zero" | "copy" | "learned"], `use_zce_mask` (True: route over the
N real experts only, which is the static model), `zce_routing` "shared" (default) or "paired".
Compute dial of shared routing: `zce_logit_bias` (default 0), added to the logits of the zero experts.
Paired routing: `zce_score` names the score's terms, `zce_threshold` (a number, or one per MoE layer) is the dial.
`model_type` stays `qwen3_moe`, so that transformers merges the per-expert weights on loading as for the stock
model.

transformers looks for the text `@use_experts_implementation` in this file before it lets a user choose
`experts_implementation`: here "eager" means a loop over experts, everything else one grouped product.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeForCausalLM,
    Qwen3MoeSparseMoeBlock,
    Qwen3MoeTopKRouter,
)

KINDS = ("zero", "copy", "learned")
ROUTINGS = ("shared", "paired")
TERMS = ("weight", "head", "residual")


class ZeroExperts(NamedTuple):
    """Zero experts of every MoE layer."""

    count: int
    """Nz."""
    kind: str
    """zero, copy or learned."""
    terms: tuple[str, ...] | None = None
    """Terms of a pick's score under paired routing; None: shared routing."""

    @property
    def rows(self) -> int:
        """Rows of the router's weight behind those of the real experts."""
        return self.count if self.terms is None else 0


def zero_experts(config) -> ZeroExperts:
    """Zero experts that a config asks for; `ValueError` where that makes no sense."""
    counts = getattr(config, "zce_nums", None)
    kinds = getattr(config, "zce_types", None) or ["zero"]
    if not counts:
        raise ValueError("config.json has no zce_nums: a model with zero experts needs e.g. [64]")
    if len(counts) != len(kinds) or len(set(kinds)) != 1 or kinds[0] not in KINDS:
        raise ValueError(
            f"zce_nums {counts} with zce_types {kinds} is not supported; one kind of {KINDS} per model"
        )
    routing = getattr(config, "zce_routing", None) or "shared"
    if routing not in ROUTINGS:
        raise ValueError(f"zce_routing {routing!r} is unknown; known: {', '.join(ROUTINGS)}")
    if routing == "shared":
        return ZeroExperts(sum(counts), kinds[0])
    if list(counts) != [config.num_experts] or kinds[0] != "zero":
        raise ValueError(
            f"zce_nums {counts} with zce_types {kinds} does not fit paired routing, which has one zero expert per "
            f"real one: [{config.num_experts}] and ['zero']"
        )
    score = getattr(config, "zce_score", None) or "+".join(TERMS)
    terms = tuple(score.split("+"))
    if not set(terms) <= set(TERMS) or len(set(terms)) < len(terms):
        raise ValueError(f"zce_score {score!r} is unknown; join some of {', '.join(TERMS)} with '+'")
    return ZeroExperts(config.num_experts, "zero", terms)


def number(key: str, value) -> float:
    """A finite float32 as a Python float; `ValueError` naming the key."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{key} {value!r} is not a number")
    rounded = torch.tensor(float(value), dtype=torch.float32, device="cpu").item()
    if not math.isfinite(rounded):
        raise ValueError(f"{key} {value!r} is not a finite number")
    return rounded


class ZeroExpertRouter(Qwen3MoeTopKRouter):
    """Router with N+Nz rows, zero experts last.

    Attributes:
        masked: route over the N real experts; the zero rows are not even multiplied.
        logit_bias: added to the logits of the zero experts.
    """

    def __init__(self, config):
        super().__init__(config)
        self.zero = zero_experts(config)
        self.kind = self.zero.kind
        self.masked = bool(getattr(config, "use_zce_mask", False))
        self.logit_bias = 0.0
        self.weight = nn.Parameter(torch.empty(self.num_experts + self.zero.rows, self.hidden_dim))
        nn.init.normal_(self.weight, std=config.initializer_range)
        if self.kind == "learned":
            self.zero_bias = nn.Parameter(torch.zeros(self.zero.count, self.hidden_dim))

    def forward(self, hidden_TH):
        """[T, H] -> logits [T, N+Nz] (masked: [T, N]), weights [T, K], ids [T, K]; ids >= N are zero."""
        logits = F.linear(hidden_TH, self.weight[: self.num_experts] if self.masked else self.weight)
        dtype = logits.dtype
        if self.logit_bias and not self.masked:
            real, zero = logits.float().split([self.num_experts, self.zero.rows], dim=-1)
            logits = torch.cat([real, zero + self.logit_bias], dim=-1)
        weights, ids = self._pick(logits)
        return logits, weights.to(dtype), ids

    def _pick(self, logits):
        """[T, E] -> float32 weights [T, K] and ids [T, K]."""
        weights, ids = torch.topk(F.softmax(logits, dtype=torch.float, dim=-1), self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, ids


class PairedZeroExpertRouter(ZeroExpertRouter):
    """Router with N rows whose picks go to their zero experts when their score is below the threshold.

    score = [weight] log of the pick's weight + [head] zero_weight.x + zero_bias - [residual] log|residual|, in
    float32; x is the router's input, the residual is the stream that the layer's output is added to.

    Attributes:
        threshold: a Python number that is a float32 exactly (a buffer would be rounded with the model's type).
    """

    def __init__(self, config):
        super().__init__(config)
        self.threshold = 0.0
        self.zero_weight = nn.Parameter(torch.zeros(self.num_experts, self.hidden_dim))
        self.zero_bias = nn.Parameter(torch.zeros(self.num_experts))
        self._residual_norm_T = None

    def see_residual(self, _norm, args):
        """Forward pre-hook of the norm before the layer: remember |residual| of its input [B, S, H]."""
        if "residual" in self.zero.terms and not self.masked:
            norm = torch.linalg.vector_norm(args[0].detach(), dim=-1, dtype=torch.float32)
            self._residual_norm_T = norm.reshape(-1)

    def forward(self, hidden_TH):
        """[T, H] -> logits [T, N], weights [T, K], ids [T, K]; skipped picks have id N."""
        logits = F.linear(hidden_TH, self.weight)
        weights, ids = self._pick(logits)
        if not self.masked:
            kept = self._scores(hidden_TH, weights, ids) >= self.threshold
            ids = torch.where(kept, ids, self.num_experts)
        return logits, weights.to(logits.dtype), ids

    @torch.no_grad()
    def _scores(self, hidden_TH, weights_TK, ids_TK):
        score_TK = torch.zeros_like(weights_TK)
        if "weight" in self.zero.terms:
            score_TK = score_TK + weights_TK.clamp(min=1e-20).log()
        if "head" in self.zero.terms:
            with torch.autocast(hidden_TH.device.type, enabled=False):
                head = F.linear(hidden_TH.float(), self.zero_weight.float(), self.zero_bias.float())
            score_TK = score_TK + head.gather(1, ids_TK)
        if "residual" in self.zero.terms:
            norm_T, self._residual_norm_T = self._residual_norm_T, None
            if norm_T is None:
                raise RuntimeError("the paired router saw no residual: run the whole decoder layer")
            score_TK = score_TK - norm_T.clamp(min=1e-20).log().unsqueeze(-1)
        return score_TK


class ZeroExpertMoeBlock(nn.Module):
    """MoE layer that computes the real slots only. Takes over the stock block's experts.

    Attributes:
        static_shapes: never ask the device how many slots are real (CUDA graphs, torch.compile). Rows of zero
            slots are then moved, but still left out of the products.
    """

    def __init__(self, config, experts):
        super().__init__()
        self.config = config
        self.gate = (ZeroExpertRouter if zero_experts(config).terms is None else PairedZeroExpertRouter)(
            config
        )
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
    """Stock Qwen3-MoE whose MoE blocks skip zero experts; `ValueError` for a config that makes no sense."""

    def __init__(self, config):
        zero = zero_experts(config)
        super().__init__(config)
        if not getattr(config, "use_zce_mask", False):
            self.num_experts = config.num_experts + zero.rows  # columns of the router logits
        for layer in self.model.layers:
            if isinstance(layer.mlp, Qwen3MoeSparseMoeBlock):
                layer.mlp = ZeroExpertMoeBlock(config, layer.mlp.experts)
                if zero.terms is not None:
                    layer.post_attention_layernorm.register_forward_pre_hook(layer.mlp.gate.see_residual)
        self.model.register_forward_pre_hook(self._pass_padding_mask, with_kwargs=True)
        if zero.terms is not None:
            self.set_zero_threshold(getattr(config, "zce_threshold", None))
        elif getattr(config, "zce_logit_bias", None) is not None:
            self.set_zero_logit_bias(config.zce_logit_bias)

    @torch.no_grad()
    def initialize_weights(self):
        """Called by `from_pretrained`: what the checkpoint lacks is unset memory, of which stock code knows nothing."""
        super().initialize_weights()
        for block in self.moe_blocks():
            for name in ("zero_weight", "zero_bias"):
                parameter = getattr(block.gate, name, None)
                if parameter is not None and not getattr(parameter, "_is_hf_initialized", False):
                    parameter.zero_()

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
        self.num_experts = self.config.num_experts + (0 if on else zero_experts(self.config).rows)

    def set_zero_threshold(self, value) -> None:
        """Compute dial of paired routing: skip picks whose score is below `value`, a number or one per MoE layer.

        config.json of a later `save_pretrained` has it too. `ValueError` if it does not fit the model.
        """
        blocks = self.moe_blocks()
        if zero_experts(self.config).terms is None:
            raise ValueError("this model's zero experts are shared: use set_zero_logit_bias")
        if value is None:
            raise ValueError(
                "config.json has no zce_threshold: paired routing needs a number, or one per MoE layer"
            )
        if isinstance(value, (list, tuple)):
            kept = values = [number("zce_threshold", v) for v in value]
        else:
            kept = number("zce_threshold", value)
            values = [kept] * len(blocks)
        if len(values) != len(blocks):
            raise ValueError(f"zce_threshold {value} has {len(values)} numbers for {len(blocks)} MoE layers")
        for block, threshold in zip(blocks, values):
            block.gate.threshold = threshold
        self.config.zce_threshold = kept

    def set_zero_logit_bias(self, value: float) -> None:
        """Compute dial of shared routing: add `value` to the logits of the zero experts.

        config.json of a later `save_pretrained` has it too. `ValueError` if it does not fit the model.
        """
        if zero_experts(self.config).terms is not None:
            raise ValueError("this model's zero experts are paired: use set_zero_threshold")
        value = number("zce_logit_bias", value)
        for block in self.moe_blocks():
            block.gate.logit_bias = value
        self.config.zce_logit_bias = value

    def zero_share(self) -> list[float]:
        """Per MoE layer: slots that chose a zero expert / all slots, padding excluded, since the last reset.

        0.0 where nothing was counted (mask on, CUDA graph, torch.compile).
        """
        return [int(block.zero_slots) / max(int(block.all_slots), 1) for block in self.moe_blocks()]

    def reset_zero_share(self) -> None:
        """Start counting anew."""
        for block in self.moe_blocks():
            block.reset_counts()
