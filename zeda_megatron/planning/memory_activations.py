"""Bytes of activations on one GPU: what a layer keeps for its backward pass, what is alive while it runs.

Counts of the tensors that autograd holds in Megatron's layers with Transformer Engine's attention (no [S, S] scores)
and unfused activations, as this project configures them. They are estimates: a test compares those of the local layers
with what one layer really saves on the CPU.

Dimensions: S tokens of a row on this rank where sequences are split (TP x CP), T where they are not (CP), R rows that
this rank's experts get, H hidden, F width of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config.parallel import ParallelConfig
from ..config.zero_experts import ZeroExpertConfig
from ..models.architecture import Architecture
from .flops import linear_attention


@dataclass(frozen=True)
class ExpertLoad:
    """Rows of one MoE layer on one rank."""

    sent: float
    """Picks of real experts by this rank's tokens: rows that it sends."""
    received: float
    """Rows that its experts compute."""


@dataclass(frozen=True)
class Layer:
    """What decides the activations of a layer."""

    fields: dict
    """Megatron's config of the architecture."""
    parallel: ParallelConfig
    """Layout."""
    router_rows: int
    """N + Nz (paired zero experts: N)."""
    width: int
    """Bytes of a number: 2 in bf16, 4 in fp32."""
    local: bool = False
    """Without Transformer Engine: a norm keeps one tensor more, attention repeats keys and values for all heads and
    keeps its output twice."""

    @classmethod
    def of(
        cls,
        arch: Architecture,
        parallel: ParallelConfig,
        zero: ZeroExpertConfig,
        width: int,
        local: bool = False,
    ) -> Layer:
        rows = arch.megatron["num_moe_experts"] + zero.num_zero_rows
        return cls(arch.megatron, parallel, rows, width, local)

    @property
    def hidden(self) -> int:
        """H."""
        return self.fields["hidden_size"]

    def load(self, tokens: float, zero_share: float = 0.0, worst: bool = False) -> ExpertLoad:
        """Rows for `tokens` on this rank: evenly spread over experts, or (worst) every pick of the whole
        expert-parallel group that can go to this rank's experts does."""
        topk, experts = self.fields["moe_router_topk"], self.fields["num_moe_experts"]
        ep, etp = self.parallel.expert_model_parallel_size, self.parallel.expert_tensor_parallel_size
        sent = tokens * topk * (1.0 - zero_share)
        if not worst:
            return ExpertLoad(sent, etp * sent)
        return ExpertLoad(sent, ep * etp * min(sent, tokens * (experts // ep)))

    def attention(self, tokens: float) -> float:
        """Bytes that norm and attention of one layer keep for `tokens` per rank of the split sequence; where there are
        two kinds of attention, those of the larger one."""
        return max(self._attending(tokens), self._linear(tokens))

    def _linear(self, tokens: float) -> float:
        """Of a gated delta network: what the convolution is given and gives, the recurrence, mixed values and gates in
        float32, values as they are normed, weighted and gated.

        The recurrence: PyTorch's (`local`) keeps float32 tensors of every chunk of 64 tokens, counted by measuring;
        FLA's kernel keeps queries, keys, values and one matrix for each chunk (as its code says; not measured)."""
        fields, tp, width = self.fields, self.parallel.tensor_model_parallel_size, self.width
        if not fields.get("linear_attention_freq"):
            return 0.0
        heads, key_heads = fields["linear_num_value_heads"] / tp, fields["linear_num_key_heads"] / tp
        key, value = fields["linear_key_head_dim"], fields["linear_value_head_dim"]
        if self.local:
            recurrence = 4 * ((12 if width == 4 else 8) * key + 3 * value + key * value / 64 + 5.1 * 64)
        else:
            recurrence = width * (2 * key + value + 64) + 8
        head = recurrence + value * (12 + 3 * width) + 12 + width
        inside = 2 * (2 * key_heads * key + heads * value) * width + heads * head
        return tokens * self.norm * self.hidden * width + tokens * tp * inside

    def _attending(self, tokens: float) -> float:
        fields, tp = self.fields, self.parallel.tensor_model_parallel_size
        heads = fields["num_attention_heads"] / tp
        if fields.get("multi_latent_attention"):
            rotary, value = fields["qk_pos_emb_head_dim"], fields["v_head_dim"]
            latents = self.norm * ((fields["q_lora_rank"] or 0) + fields["kv_lora_rank"]) + rotary
            # query and key, value, output
            inside = heads * (2 * (fields["qk_head_dim"] + rotary) + value + value * (1 + self.local))
        else:
            groups, rotary = fields["num_query_groups"] / tp, fields["kv_channels"]
            normed = fields["qk_layernorm"]
            # The projection's output is kept by the norm of the keys, or because values lie in it.
            projected = heads + 2 * groups if normed or not self.local else 0
            if fields.get("attention_output_gate"):
                projected += 3 * heads  # the gate, its sigmoid, and what it is multiplied with
            norms = heads + self.local * (heads + groups) if normed else 0
            keys = 2 * heads if self.local else groups
            inside = (projected + norms + heads + keys + heads * (1 + self.local)) * rotary
            latents = 0
        split = self.norm * self.hidden + latents
        inside += 4 * rotary
        return (tokens * split + tokens * tp * inside) * self.width + 4 * tokens * tp * heads

    @property
    def norm(self) -> int:
        """Tensors that a norm and the product behind it keep: input, output."""
        return 3 if self.local else 2

    def dense_mlp(self, tokens: float) -> float:
        """Bytes that norm and dense MLP keep: gate and up together, silu(gate), up, product."""
        return tokens * (self.norm * self.hidden + 5 * self.fields["ffn_hidden_size"]) * self.width

    def moe(self, tokens: float, load: ExpertLoad) -> float:
        """Bytes that norm, router, experts and shared expert keep; an expert keeps its weighted product too."""
        etp = self.parallel.expert_tensor_parallel_size
        shared = self.fields.get("moe_shared_expert_intermediate_size") or 0
        expert = self.hidden + 6 * self.fields["moe_ffn_hidden_size"] / etp
        routing = (
            8 * (self.router_rows + self.fields["num_moe_experts"]) + 12 * self.fields["moe_router_topk"]
        )
        return (
            tokens * (self.norm * self.hidden + 5 * shared) * self.width
            + tokens * routing
            + load.received * (expert * self.width + 4)
            + load.sent * 8
        )

    def dispatch(self, load: ExpertLoad) -> float:
        """Bytes of the rows on their way to the experts and back: sorted by expert, and as sent or received."""
        return 2 * (load.sent + load.received) * self.hidden * self.width

    def gradients(self, tokens: float, load: ExpertLoad) -> float:
        """Bytes of gradients of activations alive while a layer's backward pass runs."""
        etp = self.parallel.expert_tensor_parallel_size
        inside = self.fields["moe_ffn_hidden_size"] / etp
        return load.received * inside * (3 * self.width + 4) + 3 * tokens * self.hidden * self.width

    def cache(self) -> float:
        """Bytes of keys and values that a layer which attends to keys caches per token of an answer."""
        fields, tp = self.fields, self.parallel.tensor_model_parallel_size
        if not fields.get("multi_latent_attention"):
            return 2 * fields["num_query_groups"] / tp * fields["kv_channels"] * self.width
        # Megatron caches them expanded, not the latents.
        per_head = fields["qk_head_dim"] + fields["qk_pos_emb_head_dim"] + fields["v_head_dim"]
        return fields["num_attention_heads"] / tp * per_head * self.width

    def state(self) -> float:
        """Bytes that a gated delta network keeps for an answer."""
        tp = self.parallel.tensor_model_parallel_size
        return linear_attention(self.fields).kept(self.width) / tp


def kept_per_layer(
    layer: Layer, recompute: str | None, tokens: float, load: ExpertLoad, sparse: bool
) -> float:
    """Bytes that one layer keeps until its backward pass begins."""
    if recompute == "full":
        return tokens * layer.hidden * layer.width
    if recompute == "selective" and sparse:  # of the experts only the input, and the norm before them
        return layer.attention(tokens) + layer.norm * tokens * layer.hidden * layer.width
    mlp = layer.moe(tokens, load) if sparse else layer.dense_mlp(tokens)
    return layer.attention(tokens) + mlp
