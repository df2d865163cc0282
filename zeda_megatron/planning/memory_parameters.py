"""How many parameters one GPU holds: exact counts of every pipeline stage on a parallel layout, from the config alone.

A layer's parts: attention, norms, router, shared expert and dense MLP (`dense`: their gradients are summed over all
data- and context-parallel ranks), and the real experts of this rank (`expert`: over the ranks that hold the same ones).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config.lora import LoRA
from ..config.parallel import ParallelConfig, stage_layers
from ..config.zero_experts import ZeroExpertConfig
from ..models.architecture import Architecture
from .flops import attention_others, linear_attention


@dataclass(frozen=True)
class MTPParameters:
    """Parameters of a head of multi-token prediction on one rank: a MoE layer, `eh_proj` and three norms."""

    dense: int
    """All but the real experts."""
    expert: int
    """The real experts of this rank."""
    paired: int
    """Part of `dense`, as for a stage."""
    stand_ins: int
    """Part of `dense`, as for a stage."""


@dataclass(frozen=True)
class StageParameters:
    """Parameters (numbers, not bytes) of one rank of a pipeline stage."""

    layers: int
    """Decoder layers of the stage."""
    moe_layers: int
    """Those of them that have experts."""
    linear_layers: int
    """Those of them that have linear attention."""
    dense: int
    """All but the real experts."""
    expert: int
    """The real experts of this rank."""
    router: int
    """Part of `dense`: everything under `.router.`, which `--trainable router` trains."""
    norms: int
    """Part of `dense`: weights of norms."""
    paired: int
    """Part of `router`: heads of paired zero experts, frozen unless `--paired-head-lr` is given."""
    stand_ins: int
    """Part of `router`: what answers for skipped experts, always frozen."""
    head: int
    """Part of `dense`: rows of the LM head; 0 before the last stage."""
    largest_layer: int
    """Parameters of its largest layer."""
    adapters: int = 0
    """Part of `dense`: low-rank adapters of attention, dense MLPs and shared experts."""
    expert_adapters: int = 0
    """Part of `expert`: those of real experts."""
    mtp: MTPParameters | None = None
    """Those of `dense` and `expert` that are a head of multi-token prediction, which the teacher has not."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.expert

    @property
    def of_decoder(self) -> int:
        """All without a head of multi-token prediction, and without adapters: what a teacher has."""
        head = self.mtp.dense + self.mtp.expert if self.mtp else 0
        return self.total - head - self.adapters - self.expert_adapters

    def trainable(self, what: str, paired_trains: bool) -> tuple[int, int]:
        """(dense, expert) parameters that have gradients; `what`: --trainable."""
        part = self.mtp if what == "mtp" else self
        frozen = part.stand_ins + (0 if paired_trains else part.paired)
        named = {
            "router": (self.router, 0),
            "router+norms": (self.router + self.norms, 0),
            "lora": (self.router + self.adapters, self.expert_adapters),
        }
        dense, expert = named.get(what, (part.dense, part.expert))
        return dense - frozen, expert


def stage_parameters(
    arch: Architecture, parallel: ParallelConfig, zero: ZeroExpertConfig, lora: LoRA | None = None
) -> tuple[StageParameters, ...]:
    """Counts of all pipeline stages. The layout must divide the model (`models.build.check_layout`).

    `lora`: adapters that the model has.
    """
    fields, tp = arch.megatron, parallel.tensor_model_parallel_size
    stages = stage_layers(fields["num_layers"], parallel)
    vocabulary = math.ceil(arch.vocab_size / tp) * fields["hidden_size"]
    found = []
    for place, layers in enumerate(stages):
        first, last = place == 0, place == len(stages) - 1
        sparse = sum(bool(fields["moe_layer_freq"][layer]) for layer in layers)
        pattern = fields.get("linear_attention_freq")
        linear = [bool(pattern and pattern[layer]) for layer in layers]
        inside = [delta_network(fields, tp) if it else attention(fields, tp) for it in linear]
        router = sparse * _router(fields, zero)
        norms = 2 * fields["hidden_size"]
        dense_mlp = mlp(fields, fields["ffn_hidden_size"], tp)
        beside = mlp(fields, fields.get("moe_shared_expert_intermediate_size") or 0, tp)
        beside += fields["hidden_size"] if fields.get("moe_shared_expert_gate") else 0
        dense = (
            sum(inside) + len(layers) * norms + (len(layers) - sparse) * dense_mlp + sparse * beside + router
        )
        # A tied head is the embedding itself on one stage, a copy of it on the last of several.
        copies = first + (last and not (first and arch.tie_word_embeddings))
        dense += copies * vocabulary + last * fields["hidden_size"]
        expert = experts_of_layer(fields, parallel)
        norms += max(inside)
        moe = norms + beside + _router(fields, zero) + expert if sparse else 0
        mtp = None
        if last and arch.mtp_layers:
            hidden = fields["hidden_size"]
            joined = 2 * hidden * hidden // tp + 3 * hidden
            own = norms + beside + _router(fields, zero) + joined
            mtp = MTPParameters(own, expert, _paired(fields, zero), _stand_ins(fields, zero))
        heads = 1 if mtp else 0
        adapters, expert_adapters = _adapters(fields, parallel, lora, linear, sparse) if lora else (0, 0)
        found.append(
            StageParameters(
                layers=len(layers),
                moe_layers=sparse,
                linear_layers=sum(linear),
                dense=dense + (mtp.dense if mtp else 0) + adapters,
                expert=(sparse + heads) * expert + expert_adapters,
                router=router + heads * _router(fields, zero),
                norms=sum(_norms(fields, is_linear, tp) for is_linear in linear)
                + last * fields["hidden_size"]
                + heads * (_norms(fields, False, tp) + 3 * fields["hidden_size"]),
                paired=(sparse + heads) * _paired(fields, zero),
                stand_ins=(sparse + heads) * _stand_ins(fields, zero),
                head=last * vocabulary,
                largest_layer=max(moe, norms + dense_mlp if sparse < len(layers) else 0),
                adapters=adapters,
                expert_adapters=expert_adapters,
                mtp=mtp,
            )
        )
    return tuple(found)


def attention(fields: dict, tp: int) -> int:
    """Parameters of a layer's attention on one tensor-parallel rank, its inner norms included."""
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    if not fields.get("multi_latent_attention"):
        groups, head = fields["num_query_groups"], fields["kv_channels"]
        split, whole = attention_others(fields)
        gates = heads if fields.get("attention_output_gate") else 0
        return (hidden * (2 * heads + gates + 2 * groups) * head + split) // tp + whole
    nope, rope, value = fields["qk_head_dim"], fields["qk_pos_emb_head_dim"], fields["v_head_dim"]
    latent, query_latent = fields["kv_lora_rank"], fields["q_lora_rank"]
    query = heads * (nope + rope) // tp
    # Down projections and norms of latents are whole on every tensor-parallel rank.
    down = hidden * (latent + rope) + latent
    if query_latent:
        down += hidden * query_latent + query_latent
        query *= query_latent
    else:
        query *= hidden
    return down + query + latent * heads * (nope + value) // tp + heads * value * hidden // tp


def delta_network(fields: dict, tp: int) -> int:
    """Parameters of a layer's gated delta network on one tensor-parallel rank, its inner norm included."""
    made = linear_attention(fields)
    whole = fields["linear_value_head_dim"]
    return (made.projection + made.others - whole) // tp + whole


def _norms(fields: dict, is_linear: bool, tp: int) -> int:
    """Weights of a layer's norms, those inside its attention among them."""
    around = 2 * fields["hidden_size"]
    if is_linear:
        return around + fields["linear_value_head_dim"]
    if fields.get("multi_latent_attention"):
        return around + fields["kv_lora_rank"] + (fields["q_lora_rank"] or 0)
    heads, head = fields["num_attention_heads"] + fields["num_query_groups"], fields["kv_channels"]
    over_heads = heads * head // tp if fields.get("qk_norm_over_heads") else 0
    return around + over_heads + (2 * head if fields["qk_layernorm"] else 0)


def mlp(fields: dict, width: int, tp: int) -> int:
    """Parameters of a gated MLP on one tensor-parallel rank."""
    return 3 * fields["hidden_size"] * width // tp


def experts_of_layer(fields: dict, parallel: ParallelConfig) -> int:
    """Parameters of one layer's real experts on one rank."""
    experts = fields["num_moe_experts"] // parallel.expert_model_parallel_size
    biases = 2 * fields["moe_ffn_hidden_size"] + fields["hidden_size"] if fields["add_bias_linear"] else 0
    return experts * (
        mlp(fields, fields["moe_ffn_hidden_size"], parallel.expert_tensor_parallel_size) + biases
    )


def _adapters(
    fields: dict, parallel: ParallelConfig, lora: LoRA, linear: list[bool], sparse: int
) -> tuple[int, int]:
    """(dense, expert) parameters of a stage's adapters on one rank; `linear`: which of its layers have linear
    attention; `sparse`: how many have experts."""
    tp, rank, hidden = parallel.tensor_model_parallel_size, lora.rank, fields["hidden_size"]

    def gated(width: int, ranks: int) -> int:
        """Of an MLP of that width: both halves of a projection are whole but for the width's part."""
        return rank * (2 * hidden + 3 * width // ranks) if width else 0

    attention = dense = expert = 0
    if lora.has("attention"):
        attention = sum(_of_attention(fields, tp, rank, it) for it in linear)
    if lora.has("shared"):
        shared = gated(fields.get("moe_shared_expert_intermediate_size") or 0, tp)
        dense = sparse * shared + (len(linear) - sparse) * gated(fields["ffn_hidden_size"], tp)
    if lora.has("experts"):
        experts = fields["num_moe_experts"] // parallel.expert_model_parallel_size
        expert = sparse * experts * gated(fields["moe_ffn_hidden_size"], 1)
    return attention + dense, expert


def _of_attention(fields: dict, tp: int, rank: int, is_linear: bool) -> int:
    """Adapters of a layer's attention: of each projection the whole side, and this rank's part of the other."""
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    if is_linear:
        key_heads, values = fields["linear_num_key_heads"], fields["linear_num_value_heads"]
        value = values * fields["linear_value_head_dim"]
        into = 2 * key_heads * fields["linear_key_head_dim"] + 2 * value + 2 * values
        return rank * (2 * hidden + (into + value) // tp)
    if not fields.get("multi_latent_attention"):
        groups, head = fields["num_query_groups"], fields["kv_channels"]
        gates = heads if fields.get("attention_output_gate") else 0
        return rank * (2 * hidden + (heads + gates + 2 * groups + heads) * head // tp)
    query = heads * (fields["qk_head_dim"] + fields["qk_pos_emb_head_dim"])
    latent, query_latent = fields["kv_lora_rank"], fields["q_lora_rank"]
    value = heads * fields["v_head_dim"]
    down = hidden + latent + fields["qk_pos_emb_head_dim"]
    down += hidden + 2 * query_latent if query_latent else hidden
    up = latent + (query + heads * fields["qk_head_dim"] + value) // tp
    return rank * (down + up + value // tp + hidden)


def _router(fields: dict, zero: ZeroExpertConfig) -> int:
    rows = fields["num_moe_experts"] + zero.num_zero_rows
    if zero.zero_experts_type == "learned":
        rows += zero.num_zero_experts
    biases = fields["num_moe_experts"] + zero.num_zero_rows if fields["add_bias_linear"] else 0
    return rows * fields["hidden_size"] + biases + _paired(fields, zero) + _stand_ins(fields, zero)


def _paired(fields: dict, zero: ZeroExpertConfig) -> int:
    if not zero.paired:
        return 0
    hidden, experts, units = fields["hidden_size"], zero.num_zero_experts, zero.paired_head_width
    return experts * (hidden + 1) + units * (hidden + 1 + experts)


def _stand_ins(fields: dict, zero: ZeroExpertConfig) -> int:
    if not zero.paired or zero.zero_experts_type == "zero":
        return 0
    return zero.num_zero_experts * fields["hidden_size"] * (2 * zero.stand_in_rank + 1)
