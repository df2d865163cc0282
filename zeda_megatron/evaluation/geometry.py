"""Geometry of a Mixture-of-Experts model: the sizes in a HF config.json that decide what it costs.

Nothing here needs the weights or torch. Two architectures: `qwen3_moe` (grouped-query attention) and
`glm4_moe_lite` (multi-latent attention, a shared expert, dense first layers).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError


@dataclass(frozen=True)
class Attention:
    """One attention layer, in multiply-adds and numbers per token."""

    projection: int
    """Weights of all projections; also multiply-adds per token (every weight is used once)."""
    bias: int
    """Biases of the projections (parameters only)."""
    norm: int
    """Weights of the norms inside attention (parameters only)."""
    per_key: int
    """Multiply-adds per token and attended key, scores and values together, keys and values expanded."""
    per_cached_key: int
    """The same when decoding from the cache. With latent attention the cache holds latents and the query is
    projected into their space (weights absorbed), which costs more per key and reads far less memory."""
    cache: int
    """Numbers kept per token in the key/value cache."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of one model. All counts are of numbers, not bytes."""

    model_type: str
    """`qwen3_moe` or `glm4_moe_lite`."""
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
    zero_experts: int
    """Zero experts the checkpoint already has, Nz (key `zce_nums`); 0 for a static model."""
    vocabulary: int
    """V."""
    tied: bool
    """True when the LM head is the embedding."""
    attention: Attention

    @property
    def expert(self) -> int:
        """Weights of one routed expert (gate, up, down), also its multiply-adds per row."""
        return 3 * self.hidden * self.expert_width

    @property
    def parameters(self) -> int:
        """All parameters."""
        norms = self.hidden * (2 * self.layers + 1) + self.layers * self.attention.norm
        attention = self.layers * (self.attention.projection + self.attention.bias)
        router = self.moe_layers * self.hidden * (self.experts + self.zero_experts)
        shared = self.moe_layers * 3 * self.hidden * self.shared_width
        dense = (self.layers - self.moe_layers) * 3 * self.hidden * self.dense_width
        vocabulary = self.hidden * self.vocabulary * (1 if self.tied else 2)
        return norms + attention + router + shared + dense + vocabulary + self.routed_parameters

    @property
    def routed_parameters(self) -> int:
        """Parameters of the routed experts of all layers."""
        return self.moe_layers * self.experts * self.expert

    def active_parameters(self, zero_share: float = 0.0) -> float:
        """Parameters one token uses when the share `zero_share` of its picks chose a zero expert."""
        idle = self.experts - self.topk * (1.0 - zero_share)
        return self.parameters - self.moe_layers * idle * self.expert

    @classmethod
    def read(cls, hf: str | Path) -> Geometry:
        """Read the config.json in the folder `hf` (or that file itself)."""
        path = Path(hf)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"{path}: no such file; --hf takes a folder with a HF config.json")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
        return cls.from_config(config, name=str(path))

    @classmethod
    def from_config(cls, config: dict, name: str = "config.json") -> Geometry:
        """Build from the keys of a HF config; `name` is used in error messages."""
        kind = config.get("model_type")
        builder = _BUILDERS.get(kind)
        if builder is None:
            raise UserError(f"{name}: model_type {kind!r} is not known here; known: {', '.join(_BUILDERS)}")
        try:
            return builder(config)
        except KeyError as key:
            raise UserError(f"{name}: key {key} is missing; a {kind} config needs it") from None


def _zero_experts(config: dict) -> int:
    return sum(config.get("zce_nums") or [])


def _qwen3_moe(config: dict) -> Geometry:
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim") or hidden // heads
    experts = config["num_experts"] if "num_experts" in config else config["num_local_experts"]
    dense_only, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step", 1)
    sparse = [i for i in range(layers) if i not in dense_only and experts > 0 and (i + 1) % step == 0]
    bias = (heads * head + 2 * groups * head + hidden) if config.get("attention_bias") else 0
    return Geometry(
        model_type="qwen3_moe",
        hidden=hidden,
        layers=layers,
        moe_layers=len(sparse),
        dense_width=config["intermediate_size"],
        experts=experts,
        topk=config["num_experts_per_tok"],
        expert_width=config["moe_intermediate_size"],
        shared_width=0,
        zero_experts=_zero_experts(config),
        vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        attention=Attention(
            projection=2 * hidden * heads * head + 2 * hidden * groups * head,
            bias=bias,
            norm=2 * head,
            per_key=2 * heads * head,
            per_cached_key=2 * heads * head,
            cache=2 * groups * head,
        ),
    )


def _glm4_moe_lite(config: dict) -> Geometry:
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    latent, query_latent = config["kv_lora_rank"], config.get("q_lora_rank")
    query_width = heads * (nope + rope)
    query = hidden * query_latent + query_latent * query_width if query_latent else hidden * query_width
    bias = ((query_latent or 0) + latent + rope + hidden) if config.get("attention_bias") else 0
    kinds = config.get("mlp_layer_types")
    dense = kinds.count("dense") if kinds else config.get("first_k_dense_replace", 1)
    experts = config["n_routed_experts"] if "n_routed_experts" in config else config["num_local_experts"]
    return Geometry(
        model_type="glm4_moe_lite",
        hidden=hidden,
        layers=layers,
        moe_layers=layers - dense,
        dense_width=config["intermediate_size"],
        experts=experts,
        topk=config["num_experts_per_tok"],
        expert_width=config["moe_intermediate_size"],
        shared_width=config["moe_intermediate_size"] * config.get("n_shared_experts", 1),
        zero_experts=_zero_experts(config),
        vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        attention=Attention(
            projection=query
            + hidden * (latent + rope)
            + latent * heads * (nope + value)
            + heads * value * hidden,
            bias=bias,
            norm=latent + (query_latent or 0),
            per_key=heads * (nope + rope + value),
            per_cached_key=heads * (2 * latent + rope),
            cache=latent + rope,
        ),
    )


_BUILDERS = {"qwen3_moe": _qwen3_moe, "glm4_moe_lite": _glm4_moe_lite}
