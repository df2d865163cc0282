"""MoE layers that compute the real slots only, and the model around them; travels with checkpoints."""

import torch
from torch import nn
from torch.nn import functional as F

from .zero_expert_routing import number, zero_experts


class ZeroExpertMoeBlock(nn.Module):
    """MoE layer that computes the real slots only. Takes over the stock block's experts, shared one included.

    Attributes:
        static_shapes: never ask the device how many slots are real (CUDA graphs, torch.compile). Rows of zero
            slots are then moved, but still left out of the products.
    """

    def __init__(self, config, stock, router):
        super().__init__()
        self.config, self.gate, self.experts = config, router, stock.experts
        self.shared_experts = getattr(stock, "shared_experts", None)
        self.static_shapes, self.token_mask_BS = False, None
        self.reset_counts()

    def reset_counts(self):
        self.zero_slots, self.all_slots = 0, 0

    def forward(self, hidden_BSH):
        """[B, S, H] -> [B, S, H]."""
        hidden_TH = hidden_BSH.reshape(-1, hidden_BSH.shape[-1])
        _, weights_TK, ids_TK = self.gate(hidden_TH)
        if self.gate.masked:
            output_TH = self.experts(hidden_TH, ids_TK, weights_TK)
        else:
            output_TH = self._routed(hidden_TH, weights_TK, ids_TK, hidden_BSH.shape).to(hidden_TH.dtype)
        output_BSH = output_TH.view_as(hidden_BSH)
        return output_BSH if self.shared_experts is None else output_BSH + self.shared_experts(hidden_BSH)

    def _routed(self, hidden_TH, weights_TK, ids_TK, shape):
        static = self.static_shapes or _shapes_must_be_static()
        zero_TK, kind = ids_TK >= self.gate.num_real, self.gate.zero.kind
        if not static:
            self._count(zero_TK, shape)
        output_TH = self._real_slots(hidden_TH, weights_TK, ids_TK, static)
        if kind == "copy":
            output_TH = output_TH + (weights_TK * zero_TK).sum(dim=-1, keepdim=True) * hidden_TH
        elif kind == "learned":
            bias_TKH = self.gate.zero_bias[(ids_TK - self.gate.num_real).clamp(min=0)]
            output_TH = output_TH + ((weights_TK * zero_TK).unsqueeze(-1) * bias_TKH).sum(dim=1)
        return output_TH

    def _real_slots(self, hidden_TH, weights_TK, ids_TK, static):
        num_real, top_k = self.gate.num_real, ids_TK.shape[1]
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


def _is_packed(config):
    """Weights packed by NVIDIA ModelOpt, whose scales transformers does not read."""
    found = getattr(config, "quantization_config", None)
    return (found.get("quant_method") if isinstance(found, dict) else None) == "modelopt"


class ZeroExpertModel:
    """Goes before a stock `...ForCausalLM` among the bases of a class, which names the three below."""

    MOE_BLOCK: type
    """The stock MoE block that is replaced."""
    ROUTER: type
    """Router with zero experts, built from the config."""
    NUM_EXPERTS: str
    """Config key of N."""
    _auto_class = "AutoModelForCausalLM"
    """`save_pretrained` brings these files (transformers 5.0 asks for it, as the model type is a native one)."""

    def __init__(self, config):
        zero = zero_experts(config, getattr(config, self.NUM_EXPERTS))
        if _is_packed(config):
            raise ValueError(
                "config.json: quantization_config of modelopt: transformers would take packed weights for plain ones; "
                "open the folder with zeda_megatron.serving.load.load_model"
            )
        super().__init__(config)
        self._columns(getattr(config, "use_zce_mask", False))
        for layer in self.model.layers:
            if isinstance(layer.mlp, self.MOE_BLOCK):
                layer.mlp = ZeroExpertMoeBlock(config, layer.mlp, self.ROUTER(config))
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

    def _zero(self):
        return zero_experts(self.config, getattr(self.config, self.NUM_EXPERTS))

    def _columns(self, masked: bool) -> None:
        """Tell the stock load-balancing loss, where there is one, how many columns router logits have."""
        if hasattr(self, "num_experts"):
            self.num_experts = getattr(self.config, self.NUM_EXPERTS) + (0 if masked else self._zero().rows)

    def _pass_padding_mask(self, module, args, kwargs):
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        usable = isinstance(mask, torch.Tensor) and mask.dim() == 2
        for block in self.moe_blocks():
            block.token_mask_BS = mask if usable else None

    def set_zero_mask(self, on: bool) -> None:
        """True: route over the real experts only, as the static model does."""
        for block in self.moe_blocks():
            block.gate.masked = on
        self._columns(on)

    def set_zero_threshold(self, value) -> None:
        """Compute dial of paired routing: skip picks whose score is below `value`, a number or one per MoE layer.

        config.json of a later `save_pretrained` has it too. `ValueError` if it does not fit the model.
        """
        blocks = self.moe_blocks()
        if self._zero().terms is None:
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
        if self._zero().terms is not None:
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
