"""Every family of the package as a tiny model whose weights are all drawn: the one table that tests go through."""

from __future__ import annotations

from dataclasses import dataclass, field

import tiny
import transformers
from packaging.version import Version


@dataclass(frozen=True)
class Family:
    """One family."""

    fields: dict
    """Keys of the tiny config: 8 experts, top-3."""
    score: str = "softmax"
    """Kind of routing, as `tiny.dense_routing` calls it."""
    variants: dict[str, dict] = field(default_factory=lambda: {"plain": {}})
    """Name -> changed keys of configs that are followed."""
    refused: tuple[dict, ...] = ()
    """Changed keys of configs that are refused; the message names the first."""
    since: str = "5.0"
    """Version of transformers whose classes the modeling file extends."""

    @property
    def groups(self) -> tuple[int, int, int] | None:
        """Groups of experts, how many are kept, and how many best scores make a group's; None: no limit."""
        groups = self.fields.get("n_group", 1)
        return (groups, self.fields["topk_group"], 2) if groups > 1 else None

    @property
    def architecture(self) -> str:
        """transformers' class."""
        return self.fields["architectures"][0]

    @property
    def stem(self) -> str:
        """What the names of transformers' classes begin with."""
        return self.architecture.removesuffix("ForCausalLM")

    @property
    def scale(self) -> float:
        """Of all weights of picks."""
        return self.fields.get("routed_scaling_factor", 1.0)

    def make(self, seed: int = 0, std: float = 0.3, **changes):
        """A random model; `changes` are keys of its config."""
        fields = self.fields | changes
        config = transformers.CONFIG_MAPPING[fields["model_type"]](**fields)
        return tiny.drawn(getattr(transformers, self.architecture), config, seed, std)


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
}
"""Frequencies of three kinds and a factor of cosine and sine within tiny heads and short texts."""
COMMON = dict(
    vocab_size=96,
    hidden_size=32,
    num_attention_heads=4,
    num_experts_per_tok=3,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
"""Keys that all tiny models have."""
GLM4_MOE = COMMON | dict(
    architectures=["Glm4MoeForCausalLM"],
    model_type="glm4_moe",
    intermediate_size=48,
    num_hidden_layers=3,
    num_key_value_heads=2,
    head_dim=12,
    n_routed_experts=8,
    n_shared_experts=1,
    moe_intermediate_size=16,
    routed_scaling_factor=2.5,
    first_k_dense_replace=1,
    attention_bias=True,
    use_qk_norm=True,
    rms_norm_eps=1e-5,
    num_nextn_predict_layers=0,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
)

LATENT = COMMON | dict(
    intermediate_size=48,
    num_hidden_layers=3,
    num_key_value_heads=4,
    q_lora_rank=12,
    kv_lora_rank=16,
    qk_nope_head_dim=10,
    qk_rope_head_dim=8,
    v_head_dim=6,
    n_routed_experts=8,
    n_shared_experts=2,
    moe_intermediate_size=16,
    routed_scaling_factor=1.6,
    first_k_dense_replace=1,
    rms_norm_eps=1e-5,
    rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
)
"""Of DeepSeek's models: latent attention, first layer dense; no two sizes are equal by chance."""
DEEPSEEK_V3 = LATENT | dict(
    architectures=["DeepseekV3ForCausalLM"],
    model_type="deepseek_v3",
    n_group=4,
    topk_group=2,
    num_nextn_predict_layers=0,
)
DEEPSEEK_V2 = LATENT | dict(
    architectures=["DeepseekV2ForCausalLM"],
    model_type="deepseek_v2",
    q_lora_rank=None,
    topk_method="greedy",
    n_group=1,
    topk_group=1,
)
GPT_OSS = COMMON | dict(
    architectures=["GptOssForCausalLM"],
    model_type="gpt_oss",
    intermediate_size=16,
    num_hidden_layers=3,
    num_key_value_heads=2,
    head_dim=12,
    num_local_experts=8,
    sliding_window=5,
    rms_norm_eps=1e-5,
    rope_parameters=YARN | {"truncate": False},
)
"""Windows of 5 in two of three layers."""
MINIMAX_M2 = COMMON | dict(
    architectures=["MiniMaxM2ForCausalLM"],
    model_type="minimax_m2",
    intermediate_size=16,
    num_hidden_layers=2,
    num_key_value_heads=2,
    head_dim=12,
    num_local_experts=8,
    rms_norm_eps=1e-6,
    bos_token_id=1,
    eos_token_id=2,
    rotary_dim=6,
    rope_theta=5e6,
    # Keys of published folders that vLLM reads and transformers does not have.
    scoring_func="sigmoid",
    use_routing_bias=True,
    use_qk_norm=True,
    qk_norm_type="per_layer",
)
OLMOE = COMMON | dict(
    architectures=["OlmoeForCausalLM"],
    model_type="olmoe",
    intermediate_size=16,
    num_hidden_layers=2,
    num_key_value_heads=4,
    num_experts=8,
    rms_norm_eps=1e-5,
    pad_token_id=1,
    eos_token_id=2,
)
QWEN2_MOE = COMMON | dict(
    architectures=["Qwen2MoeForCausalLM"],
    model_type="qwen2_moe",
    intermediate_size=48,
    num_hidden_layers=2,
    num_key_value_heads=2,
    num_experts=8,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=40,
    rms_norm_eps=1e-6,
)
QWEN3_NEXT = COMMON | dict(
    architectures=["Qwen3NextForCausalLM"],
    model_type="qwen3_next",
    intermediate_size=48,
    num_hidden_layers=3,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=8,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=40,
    rms_norm_eps=1e-3,
    full_attention_interval=2,
    linear_conv_kernel_dim=4,
    linear_key_head_dim=10,
    linear_value_head_dim=6,
    linear_num_key_heads=2,
    linear_num_value_heads=6,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
)
QWEN3_5_MOE_TEXT = {
    key: value
    for key, value in QWEN3_NEXT.items()
    if key not in ("architectures", "model_type", "intermediate_size")
} | dict(
    architectures=["Qwen3_5MoeForCausalLM"],
    model_type="qwen3_5_moe_text",
    # Positions of three kinds, as published models have them: 4 pairs of channels are turned.
    rope_parameters={
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
)

EVERY = {
    "qwen3_moe": Family(
        tiny.TINY,
        variants={
            "plain": {},
            "yarn": {"rope_parameters": YARN},
            "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
        },
    ),
    "glm4_moe_lite": Family(
        tiny.GLM,
        "sigmoid",
        {
            "plain": {},
            "yarn with its factor": {"rope_parameters": YARN},
            "yarn with mscale": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}},
        },
    ),
    "mixtral": Family(
        tiny.MIXTRAL,
        variants={"plain": {}, "tied": {"tie_word_embeddings": True}, "wide heads": {"head_dim": 12}},
        refused=({"sliding_window": 4096}, {"router_jitter_noise": 0.1}, {"num_experts_per_tok": 1}),
    ),
    "glm4_moe": Family(
        GLM4_MOE,
        "sigmoid",
        {
            "plain": {},
            "as Air: no norms of queries and keys, scale 1": {
                "use_qk_norm": False,
                "routed_scaling_factor": 1.0,
            },
            "no biases, two dense layers": {"attention_bias": False, "first_k_dense_replace": 2},
            "two shared experts, tied": {"n_shared_experts": 2, "tie_word_embeddings": True},
            "groups": {"n_group": 4, "topk_group": 2},
            "yarn": {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}},
        },
        (
            {"hidden_act": "gelu"},
            {"norm_topk_prob": False},
            {"num_experts_per_tok": 1},
            {"n_group": 3},
            {"n_group": 8, "topk_group": 3},
            {"first_k_dense_replace": 3},
        ),
    ),
    "deepseek_v3": Family(
        DEEPSEEK_V3,
        "sigmoid",
        {
            "plain": {},
            "as Moonlight: one group, queries without latents": {
                "n_group": 1,
                "topk_group": 1,
                "q_lora_rank": None,
            },
            "as R1: mscale of all": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
            "no yarn, one of two groups": {"rope_parameters": None, "n_group": 2, "topk_group": 1},
        },
        (
            {"attention_bias": True},
            {"norm_topk_prob": False},
            {"n_group": 3},
            {"topk_group": 1},
            {"num_key_value_heads": 2},
            {"scoring_func": "softmax"},
        ),
    ),
    "deepseek_v2": Family(
        DEEPSEEK_V2,
        "pre_softmax",
        {
            "plain": {},
            "as V2: groups, latents of queries": {
                "topk_method": "group_limited_greedy",
                "n_group": 4,
                "topk_group": 2,
                "q_lora_rank": 12,
            },
            "three groups of four": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 3},
        },
        (
            {"norm_topk_prob": True},
            {"mlp_bias": True},
            {"topk_method": "noaux_tc"},
            {"num_key_value_heads": 2},
        ),
        since="5.16",
    ),
    "gpt_oss": Family(
        GPT_OSS,
        "softmax",
        {
            "plain": {},
            "other order of windows": {
                "layer_types": ["full_attention", "full_attention", "sliding_attention"],
                "sliding_window": 3,
            },
            "no windows, no yarn": {
                "layer_types": ["full_attention"] * 3,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            **(
                {"a limit that is reached": {"swiglu_alpha": 0.9, "swiglu_limit": 0.6}}
                if hasattr(transformers.GptOssConfig, "swiglu_alpha")
                else {}
            ),
        },
        (
            {"attention_bias": False},
            {"num_experts_per_tok": 1},
            {"sliding_window": None},
            {"experts_per_token": 2},
        ),
    ),
    "minimax_m2": Family(
        MINIMAX_M2,
        "sigmoid",
        {
            "plain": {},
            "all channels turned": {"rotary_dim": 12},
        },
        ({"use_routing_bias": False}, {"scoring_func": "softmax"}, {"attn_type_list": [1, 0]}),
        since="5.19",
    ),
    "olmoe": Family(
        OLMOE,
        "pre_softmax",
        {
            "plain": {},
            "grouped queries, renormalised": {"num_key_value_heads": 2, "norm_topk_prob": True},
        },
        ({"clip_qkv": 8.0}, {"attention_bias": True}),
    ),
    "qwen2_moe": Family(
        QWEN2_MOE,
        "pre_softmax",
        {
            "plain": {},
            "no biases, dense first layer": {
                "qkv_bias": False,
                "mlp_only_layers": [0],
                "norm_topk_prob": True,
            },
        },
        ({"use_sliding_window": True}, {"hidden_act": "gelu"}),
    ),
    "qwen3_next": Family(
        QWEN3_NEXT,
        "softmax",
        {
            "plain": {},
            "tied, dense first layer, one value head for a key head": {
                "tie_word_embeddings": True,
                "mlp_only_layers": [0],
                "linear_num_key_heads": 4,
                "linear_num_value_heads": 4,
                "linear_conv_kernel_dim": 3,
            },
            "without renormalising": {"norm_topk_prob": False},
        },
        (
            {"attention_bias": True},
            {"hidden_act": "gelu"},
            {"layer_types": ["linear_attention", "sliding_attention", "full_attention"]},
            {"linear_num_value_heads": 5},
            {"linear_conv_kernel_dim": 0},
            {"linear_num_key_heads": 0},
        ),
    ),
    "qwen3_5_moe_text": Family(
        QWEN3_5_MOE_TEXT,
        "softmax",
        {
            "plain": {},
            "tied, one value head for a key head": {
                "tie_word_embeddings": True,
                "linear_num_key_heads": 4,
                "linear_num_value_heads": 4,
            },
        },
        (
            {"attention_bias": True},
            {"hidden_act": "gelu"},
            {"num_experts_per_tok": 1},
            {"linear_num_value_heads": 5},
        ),
        since="5.3",
    ),
}
FAMILIES = {
    name: family
    for name, family in EVERY.items()
    if Version(transformers.__version__) >= Version(family.since)
}
"""Those that this version of transformers has."""


def seeing_model(seed: int = 0, std: float = 0.3, **changes):
    """A random model that sees, whose language model is that of `qwen3_5_moe_text`; `changes` are keys of that."""
    vision = dict(
        depth=2,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        patch_size=4,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=changes.get("hidden_size", 32),
        num_position_embeddings=16,
    )
    tokens = dict(image_token_id=3, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6)
    config = transformers.Qwen3_5MoeConfig(
        text_config=QWEN3_5_MOE_TEXT | changes, vision_config=vision, tie_word_embeddings=False, **tokens
    )
    return tiny.drawn(transformers.Qwen3_5MoeForConditionalGeneration, config, seed, std)
