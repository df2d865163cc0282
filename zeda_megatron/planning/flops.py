"""FLOP accounting: what one token costs, part by part, with and without zero experts.

A multiply-add is two FLOPs; only matrix products count (norms, softmax and rotary embedding are left out).
Zero experts take the share `zero_share` away from the routed experts and add their rows to each router.

The paper's "FLOP theory" for Qwen3-30B-A3B (zero share .5, lengths 1k to 8k: prefill 1.40x to 1.18x, decode
1.44x to 1.26x) comes out of these formulas to both digits with `lm_head=False`, a router widened by 64 rows,
and `keys` = L in prefill (no discount for causality), L/2 in decode (mean context of L generated tokens).
Those are the conventions that fit, not ones the paper states; the four figures are a test.

The geometry that decides it is that of Megatron's config, so every architecture of `models/` has one: grouped-query or
multi-latent attention, linear attention, shared experts, dense layers. Nothing here needs the weights.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from ..config.zero_experts import ZeroExpertConfig
from ..errors import UserError
from ..models.architecture import Architecture, read_architecture
from ..strict_json import read_json

BYTES = 2
"""Of a number in bf16: weights, activations and cache."""
STATIC = ZeroExpertConfig()
"""No zero experts."""


@dataclass(frozen=True)
class Attention:
    """One attention layer, in multiply-adds and numbers per token."""

    projection: int
    """Weights of all projections; also multiply-adds per token (every weight is used once)."""
    others: int
    """Weights of norms, biases and sinks inside attention (parameters only)."""
    per_key: int
    """Multiply-adds per token and attended key, scores and values together, keys and values expanded."""
    per_cached_key: int
    """The same when decoding from the cache. With latent attention the cache holds latents and the query is
    projected into their space (weights absorbed), which costs more per key and reads far less memory."""
    cache: int
    """Numbers kept per token in the key/value cache."""


@dataclass(frozen=True)
class LinearAttention:
    """One gated delta network, in multiply-adds and numbers per token."""

    projection: int
    """Weights of its projections; also multiply-adds per token."""
    others: int
    """Weights of norm, convolution, decay and step (parameters only)."""
    per_token: int
    """Multiply-adds of convolution and recurrence, token by token: what the state answers to the key, what it learns,
    what it answers to the query."""
    state: int
    """Numbers of the state that is kept per sequence, in float32."""
    inputs: int
    """The convolution's last inputs, kept beside it."""

    def kept(self, width: int) -> int:
        """Bytes kept per sequence; `width`: of an activation."""
        return 4 * self.state + width * self.inputs


@dataclass(frozen=True)
class Geometry:
    """Sizes of one model. All counts are of numbers, not bytes."""

    model_type: str
    """`model_type` of the config."""
    hidden: int
    """Width of the residual stream, H."""
    layers: int
    """Decoder layers (multi-token-prediction layers are not counted: they do not run in generation)."""
    moe_layers: int
    """Layers with routed experts; the others have one dense MLP."""
    dense_width: int
    """Width of that dense MLP."""
    experts: int
    """Real routed experts per layer, N."""
    topk: int
    """Picks per token, K."""
    expert_width: int
    """Width of one routed expert, F."""
    shared_width: int
    """Width of the shared expert(s); 0 if there is none."""
    biases: int
    """Numbers of the biases of one MoE layer: router's and experts'."""
    shared_gate: int
    """Weights of the shared expert's gate."""
    windowed: int
    """Layers whose tokens see a window alone."""
    window: int
    """Keys in that window."""
    zero_experts: int
    """Zero experts the checkpoint already has, Nz (key `zce_nums`); 0 for a static model."""
    vocabulary: int
    """V."""
    tied: bool
    """True when the LM head is the embedding."""
    attention: Attention
    """Of the layers that attend to keys."""
    linear: LinearAttention
    """Of the others."""
    linear_layers: int
    """How many these are."""
    config: dict = field(default_factory=dict, repr=False, compare=False)
    """The whole config.json."""

    @property
    def expert(self) -> int:
        """Weights of one routed expert (gate, up, down), also its multiply-adds per row."""
        return 3 * self.hidden * self.expert_width

    @property
    def parameters(self) -> int:
        """All parameters."""
        norms = self.hidden * (2 * self.layers + 1) + self.attending_layers * self.attention.others
        attention = self.projections + self.linear_layers * self.linear.others
        router = self.moe_layers * self.hidden * (self.experts + self.zero_experts)
        router += self.moe_layers * (self.biases + self.shared_gate)
        shared = self.moe_layers * 3 * self.hidden * self.shared_width
        dense = (self.layers - self.moe_layers) * 3 * self.hidden * self.dense_width
        vocabulary = self.hidden * self.vocabulary * (1 if self.tied else 2)
        return norms + attention + router + shared + dense + vocabulary + self.routed_parameters

    @property
    def attending_layers(self) -> int:
        """Layers that attend to keys, and cache them."""
        return self.layers - self.linear_layers

    @property
    def projections(self) -> int:
        """Weights of the projections of all attention layers."""
        return self.attending_layers * self.attention.projection + self.linear_layers * self.linear.projection

    @property
    def cache(self) -> int:
        """Numbers that all layers together cache per token."""
        return self.attending_layers * self.attention.cache

    @property
    def state(self) -> int:
        """Bytes that all layers together keep per sequence, however long it is."""
        return self.linear_layers * self.linear.kept(BYTES)

    @property
    def routed_parameters(self) -> int:
        """Parameters of the routed experts of all layers."""
        return self.moe_layers * self.experts * self.expert

    def active_parameters(self, zero_share: float = 0.0) -> float:
        """Parameters one token uses when the share `zero_share` of its picks chose a zero expert."""
        idle = self.experts - self.topk * (1.0 - zero_share)
        return self.parameters - self.moe_layers * idle * self.expert

    def attended(self, keys: float) -> float:
        """Keys that all layers together attend to, where a token has `keys` before it."""
        return (self.attending_layers - self.windowed) * keys + self.windowed * min(keys, self.window)

    def costs(self, zero: ZeroExpertConfig) -> tuple[float, float]:
        """See `ZeroExpertConfig.costs`."""
        return zero.costs(self.hidden, self.topk, self.expert_width)

    @classmethod
    def read(cls, hf: str | Path) -> Geometry:
        """Read the config.json in the folder `hf` (or that file itself)."""
        path = Path(hf)
        path = path / "config.json" if path.is_dir() else path
        if not path.exists():
            raise UserError(f"{path}: no such file; --hf takes a folder with a HF config.json")
        return cls.from_config(read_json(path), name=str(path))

    @classmethod
    def from_config(cls, config: dict, name: str = "config.json") -> Geometry:
        """Build from the keys of a HF config; `name` is used in error messages."""
        return _geometry(read_architecture(config, name))


def _geometry(arch: Architecture) -> Geometry:
    sizes, config = arch.megatron, arch.hf
    sparse = sum(sizes["moe_layer_freq"])
    return Geometry(
        model_type=config["model_type"],
        hidden=sizes["hidden_size"],
        layers=sizes["num_layers"],
        moe_layers=sparse,
        dense_width=sizes["ffn_hidden_size"],
        experts=sizes["num_moe_experts"],
        topk=sizes["moe_router_topk"],
        expert_width=sizes["moe_ffn_hidden_size"],
        shared_width=sizes.get("moe_shared_expert_intermediate_size") or 0,
        biases=_moe_biases(sizes),
        shared_gate=sizes["hidden_size"] if sizes.get("moe_shared_expert_gate") else 0,
        windowed=sum(sizes.get("window_attn_skip_freq") or []) if sizes.get("window_size") else 0,
        window=sizes["window_size"][0] + 1 if sizes.get("window_size") else 0,
        zero_experts=arch.num_zero_experts,
        vocabulary=arch.vocab_size,
        tied=arch.tie_word_embeddings,
        config=config,
        attention=_latent(sizes) if sizes.get("multi_latent_attention") else _grouped_query(sizes),
        linear=linear_attention(sizes),
        linear_layers=sum(sizes.get("linear_attention_freq") or []),
    )


def _moe_biases(sizes: dict) -> int:
    if not sizes["add_bias_linear"]:
        return 0
    return sizes["num_moe_experts"] * (1 + 2 * sizes["moe_ffn_hidden_size"] + sizes["hidden_size"])


def attention_others(sizes: dict) -> tuple[int, int]:
    """Weights of norms, biases and sinks of one layer of grouped-query attention: those that tensor-parallel ranks
    share out, and those that all of them have."""
    head, heads, groups = sizes["kv_channels"], sizes["num_attention_heads"], sizes["num_query_groups"]
    split = heads if sizes.get("softmax_type") == "learnable" else 0
    if sizes["add_bias_linear"] or sizes.get("add_qkv_bias"):
        split += (heads + 2 * groups) * head
    if sizes.get("qk_norm_over_heads"):
        split += (heads + groups) * head
    whole = 2 * head if sizes["qk_layernorm"] else 0
    return split, whole + (sizes["hidden_size"] if sizes["add_bias_linear"] else 0)


def _grouped_query(sizes: dict) -> Attention:
    hidden, head = sizes["hidden_size"], sizes["kv_channels"]
    heads, groups = sizes["num_attention_heads"], sizes["num_query_groups"]
    gates = heads if sizes.get("attention_output_gate") else 0
    return Attention(
        projection=hidden * (2 * heads + gates + 2 * groups) * head,
        others=sum(attention_others(sizes)),
        per_key=2 * heads * head,
        per_cached_key=2 * heads * head,
        cache=2 * groups * head,
    )


def linear_attention(sizes: dict) -> LinearAttention:
    """The gated delta network of a config; all zeros where there is none."""
    if not sizes.get("linear_attention_freq"):
        return LinearAttention(0, 0, 0, 0, 0)
    key_heads, heads = sizes["linear_num_key_heads"], sizes["linear_num_value_heads"]
    key, value = sizes["linear_key_head_dim"], sizes["linear_value_head_dim"]
    taps, convolved = sizes["linear_conv_kernel_dim"], 2 * key_heads * key + heads * value
    return LinearAttention(
        projection=sizes["hidden_size"] * (convolved + 2 * heads * value + 2 * heads),
        others=convolved * taps + 2 * heads + value,
        per_token=convolved * taps + 3 * heads * key * value,
        state=heads * key * value,
        inputs=convolved * (taps - 1),
    )


def _latent(sizes: dict) -> Attention:
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    nope, rope, value = sizes["qk_head_dim"], sizes["qk_pos_emb_head_dim"], sizes["v_head_dim"]
    latent, query_latent = sizes["kv_lora_rank"], sizes["q_lora_rank"]
    query_width = heads * (nope + rope)
    query = hidden * query_latent + query_latent * query_width if query_latent else hidden * query_width
    return Attention(
        projection=query
        + hidden * (latent + rope)
        + latent * heads * (nope + value)
        + heads * value * hidden,
        others=latent + (query_latent or 0),
        per_key=heads * (nope + rope + value),
        per_cached_key=heads * (2 * latent + rope),
        cache=latent + rope,
    )


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token's forward pass, all layers together."""

    attention_projections: float
    """Query, key, value and output projections (with latent attention: both steps)."""
    attention_scores: float
    """Scores and weighted values over the attended keys; convolution and recurrence of linear attention."""
    router: float
    """Router rows, zero experts included."""
    heads: float
    """Heads of paired zero experts, which decide on picks."""
    stand_ins: float
    """What answers for skipped picks."""
    routed_experts: float
    """The real experts that were picked: proportional to 1 - zero share."""
    shared_experts: float
    """Experts every token uses."""
    dense_mlp: float
    """MLP of the layers without experts."""
    lm_head: float
    """Logits of one position."""

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    def as_dict(self) -> dict[str, float]:
        """Parts and `total`, in FLOPs per token."""
        return {**asdict(self), "total": self.total}


def flops_per_token(
    geometry: Geometry,
    keys: float,
    zero_share: float = 0.0,
    zero: ZeroExpertConfig = STATIC,
    lm_head: bool = True,
    cached: bool = False,
) -> Flops:
    """FLOPs of one token that attends to `keys` positions.

    `zero`: whose rows, heads and stand-ins are charged.
    `cached` counts latent attention the way decoding does it (query projected into latent space, weights
    absorbed); it makes no difference for grouped-query attention. Raises `UserError` for a zero share outside
    [0, 1].
    """
    if not 0.0 <= zero_share <= 1.0:
        raise UserError(f"--zero-share {zero_share} is not a share: give a number from 0 to 1")
    per_key = geometry.attention.per_cached_key if cached else geometry.attention.per_key
    hidden, moe = geometry.hidden, geometry.moe_layers
    rows = geometry.topk * (1.0 - zero_share)
    experts = 2.0 * moe * geometry.topk * geometry.expert
    head, stand_in = geometry.costs(zero)
    return Flops(
        attention_projections=2.0 * geometry.projections,
        attention_scores=2.0 * per_key * geometry.attended(keys)
        + 2.0 * geometry.linear_layers * geometry.linear.per_token,
        router=2.0 * moe * hidden * (geometry.experts + zero.num_zero_rows),
        heads=head * experts,
        stand_ins=stand_in * zero_share * experts,
        routed_experts=2.0 * moe * rows * geometry.expert,
        shared_experts=2.0 * moe * 3 * hidden * geometry.shared_width,
        dense_mlp=2.0 * (geometry.layers - moe) * 3 * hidden * geometry.dense_width,
        lm_head=2.0 * hidden * geometry.vocabulary if lm_head else 0.0,
    )


def flop_ratio(
    geometry: Geometry,
    keys: float,
    zero_share: float,
    zero: ZeroExpertConfig,
    lm_head: bool = True,
    cached: bool = False,
) -> float:
    """FLOPs of the static model divided by those of the dynamic one: the speed-up if only FLOPs counted."""
    static = flops_per_token(geometry, keys, lm_head=lm_head, cached=cached)
    dynamic = flops_per_token(geometry, keys, zero_share, zero, lm_head, cached)
    return static.total / dynamic.total
