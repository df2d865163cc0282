"""config.json is read as transformers' own config class reads it, or refused in one line."""

import copy
import inspect
import json
import os
from importlib import import_module

import pytest
import tiny
import torch
from families import FAMILIES
from transformers import CONFIG_MAPPING

from zeda_megatron.errors import UserError
from zeda_megatron.models.architecture import read_architecture

FULL = {
    "qwen": tiny.TINY
    | dict(
        rope_theta=5000.0,
        hidden_act="silu",
        attention_bias=False,
        attention_dropout=0.0,
        initializer_range=0.05,
        decoder_sparse_step=1,
        mlp_only_layers=[1],
        use_sliding_window=False,
        sliding_window=None,
        pad_token_id=0,
        eos_token_id=[1, 2],
        torch_dtype="bfloat16",
    ),
    "glm": tiny.GLM
    | dict(
        rope_theta=5000.0,
        hidden_act="silu",
        attention_bias=False,
        attention_dropout=0.0,
        initializer_range=0.05,
        first_k_dense_replace=1,
        mlp_layer_types=["dense", "sparse", "sparse"],
        n_group=1,
        topk_group=1,
        topk_method="noaux_tc",
        norm_topk_prob=True,
        rope_interleave=True,
        partial_rotary_factor=1.0,
        num_nextn_predict_layers=0,
        eos_token_id=1,
        dtype="bfloat16",
    ),
    "mixtral": tiny.MIXTRAL
    | dict(
        rope_theta=5000.0,
        hidden_act="silu",
        attention_dropout=0.0,
        initializer_range=0.05,
        router_jitter_noise=0.0,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "glm4_moe": FAMILIES["glm4_moe"].fields
    | dict(
        rope_theta=5000.0,
        partial_rotary_factor=0.5,
        hidden_act="silu",
        attention_dropout=0.0,
        initializer_range=0.05,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        eos_token_id=1,
    ),
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 7000.0}
CHANGES = [
    {"rope_parameters": PLAIN},
    {"rope_parameters": {"rope_theta": 9}},
    {"rope_parameters": {"rope_type": "default"}},
    {"rope_parameters": None, "rope_scaling": None},
    {"rope_parameters": PLAIN, "rope_scaling": YARN},
    {"rope_parameters": YARN | {"rope_theta": 1e4}, "rope_scaling": None},
    {"rope_parameters": PLAIN, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_parameters": PLAIN, "rope_scaling": {"rope_type": "default", "rope_theta": 3000.0}},
    {"rope_parameters": YARN, "rope_scaling": PLAIN},
    {"rope_scaling": YARN},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"rope_scaling": {"type": "default"}},
    {"rope_scaling": {}},
    {"rope_parameters": {"full_attention": PLAIN}},
    {"rope_parameters": {"full_attention": PLAIN}, "layer_types": ["full_attention"] * 3},
    {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}},
    {"partial_rotary_factor": 0.5},
    {"rope_theta": None},
    {"rope_theta": 1},
    {"max_position_embeddings": 128},
    {"tie_word_embeddings": True},
    {"norm_topk_prob": False},
    {"norm_topk_prob": True, "num_experts_per_tok": 1},
    {"num_experts_per_tok": 2},
    {"decoder_sparse_step": 2},
    {"mlp_only_layers": None},
    {"mlp_only_layers": [0, 1, 2]},
    {"mlp_only_layers": [7]},
    {"head_dim": 12},
    {"head_dim": None},
    {"num_key_value_heads": None},
    {"num_key_value_heads": 1},
    {"num_local_experts": 4},
    {"num_experts": 4},
    {"n_routed_experts": 4},
    {"first_k_dense_replace": 2},
    {"first_k_dense_replace": 2, "mlp_layer_types": ["dense", "dense", "sparse"]},
    {"mlp_layer_types": None},
    {"mlp_layer_types": ["sparse"] * 3},
    {"mlp_layer_types": ["dense"] * 3},
    {"mlp_layer_types": ["x"] * 3},
    {"n_shared_experts": 2},
    {"q_lora_rank": None},
    {"attention_bias": True},
    {"hidden_act": "gelu"},
    {"sliding_window": 16},
    {"use_sliding_window": True},
    {"use_sliding_window": True, "sliding_window": 16},
    {"rms_norm_eps": 1e-3},
    {"rms_norm_eps": 1},
    {"routed_scaling_factor": 2.5},
    {"attention_dropout": 0.1},
    {"initializer_range": 0.5},
    {"dtype": "float32", "torch_dtype": "bfloat16"},
    {"per_layer_config": {"0": {"intermediate_size": 8}}},
    {"layer_types": ["full_attention"] * 3},
    {"id2label": {"0": "a"}},
    {"num_labels": 10**9},
    {"attn_implementation": "eager"},
    {"transformers_version": "4.51.0", "use_cache": True, "some_new_key": [1]},
]
READ = [
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "rms_norm_eps",
    "attention_dropout",
    "num_experts_per_tok",
    "initializer_range",
    "moe_intermediate_size",
    "routed_scaling_factor",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
]
MEGATRON = {
    "num_hidden_layers": "num_layers",
    "intermediate_size": "ffn_hidden_size",
    "rms_norm_eps": "layernorm_epsilon",
    "num_experts_per_tok": "moe_router_topk",
    "initializer_range": "init_method_std",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "routed_scaling_factor": "moe_router_topk_scaling_factor",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
}


def theirs(config: dict):
    return CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))


def check_equal(config: dict) -> bool:
    """True if the two read the same, False if ours refuses; fails for anything else."""
    before = copy.deepcopy(config)
    try:
        arch = read_architecture(config)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
        return False
    assert config == before, "the raw config is what exports write"
    read, kind = theirs(config), config["model_type"]
    ours = arch.megatron
    for name in READ:
        if name in inspect.signature(type(read).__init__).parameters:
            assert ours[MEGATRON.get(name, name)] == getattr(read, name), name
    modeling = import_module(f"transformers.models.{kind}.modeling_{kind}")
    rotary = next(value for name, value in vars(modeling).items() if name.endswith("RotaryEmbedding"))(read)
    assert torch.equal(torch.tensor(arch.rotary.frequencies), rotary.inv_freq)
    assert arch.rotary.factor == pytest.approx(rotary.attention_scaling, rel=1e-12)
    assert arch.max_position_embeddings == read.max_position_embeddings
    assert arch.tie_word_embeddings is read.tie_word_embeddings
    assert arch.vocab_size == read.vocab_size
    experts = {"qwen3_moe": "num_experts", "mixtral": "num_local_experts"}
    assert ours["num_moe_experts"] == getattr(read, experts.get(kind, "n_routed_experts"))
    assert read.hidden_act == "silu"
    assert kind == "mixtral" or ours.get("add_qkv_bias", False) is read.attention_bias
    assert ours.get("window_size") is None
    assert kind == "glm4_moe_lite" or kind == "glm4_moe" or read.sliding_window is None
    if not ours.get("multi_latent_attention"):
        channels = getattr(read, "head_dim", None) or read.hidden_size // read.num_attention_heads
        assert (ours["kv_channels"], ours["num_query_groups"]) == (channels, read.num_key_value_heads)
    if ours["moe_router_score_function"] == "sigmoid":
        assert read.norm_topk_prob is True
        assert ours.get("moe_router_num_groups", read.topk_group) == read.n_group
        shared = read.moe_intermediate_size * read.n_shared_experts
        assert ours["moe_shared_expert_intermediate_size"] == shared
    layers = range(read.num_hidden_layers)
    sparse = [True for _ in layers]
    if kind == "qwen3_moe":
        assert ours["moe_router_pre_softmax"] is not read.norm_topk_prob
        sparse = [i not in read.mlp_only_layers and (i + 1) % read.decoder_sparse_step == 0 for i in layers]
    elif kind == "glm4_moe_lite":
        assert read.rope_interleave
        sparse = [kind == "sparse" for kind in read.mlp_layer_types]
    elif kind == "mixtral":
        assert read.router_jitter_noise == 0
    else:
        sparse = [i >= read.first_k_dense_replace for i in layers]
    assert ours["moe_layer_freq"] == list(map(int, sparse))
    return True


@pytest.mark.parametrize("family", FULL)
def test_every_key_may_be_left_out_and_then_is_what_transformers_takes_or_is_named(family):
    config = FULL[family]
    assert check_equal(config)
    read = [key for key in config if check_equal({k: v for k, v in config.items() if k != key})]
    sizes = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts_per_tok"}
    assert not sizes & set(read) and {"rope_theta", "max_position_embeddings", "rms_norm_eps"} <= set(read)


@pytest.mark.parametrize("family", FULL)
def test_changed_values_are_read_as_transformers_reads_them_or_refused(family):
    read = 0
    for change in CHANGES:
        for base in (FULL[family], {k: v for k, v in FULL[family].items() if k != "rope_theta"}):
            changed = {key: value for key, value in change.items()}
            config = base | changed
            if "layer_types" in config or "mlp_layer_types" in change:
                config["num_hidden_layers"] = 3
            read += check_equal(config)
    assert read > len(CHANGES) // 2, "too much is refused"


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("qwen", {"rope_parameters": PLAIN, "rope_scaling": DYNAMIC}, "rope_scaling: rope_type 'dynamic'"),
        (
            "mixtral",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling: rope_type 'dynamic'",
        ),
        ("glm", {"rope_parameters": DYNAMIC}, "rope_parameters: rope_type 'dynamic'"),
        (
            "qwen",
            {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5 is not",
        ),
        (
            "glm4_moe",
            {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.01}},
            "partial_rotary_factor 0.01",
        ),
        ("qwen", {"model_type": "mixtral"}, "model_type 'mixtral' does not belong to architecture Qwen3Moe"),
        ("qwen", {"model_type": "x"}, "model_type 'x' does not belong"),
        ("qwen", {"model_type": None}, "model_type is missing"),
        ("qwen", {"model_type": 8}, "model_type '8' must be a string"),
        ("qwen", {"architectures": ["Qwen3MoeModel"]}, "architecture 'Qwen3MoeModel' is unknown"),
        pytest.param(
            *("qwen", {"num_local_experts": 4}, "num_experts 8 and num_local_experts 4 mean the same"),
            marks=pytest.mark.skipif(
                "num_local_experts" not in CONFIG_MAPPING["qwen3_moe"].attribute_map,
                reason="this version of transformers has no second name for that key",
            ),
        ),
        ("qwen", {"rms_norm_eps": -1}, "rms_norm_eps '-1' must be a number from 0 to 1"),
        ("glm", {"rms_norm_eps": 1e308}, "rms_norm_eps"),
        ("mixtral", {"rope_theta": 1e300}, "rope_theta"),
        ("qwen", {"rope_parameters": {"rope_theta": 1e300}}, "rope_parameters: rope_theta 1e\\+300"),
        ("qwen", {"rope_theta": 10**400}, "rope_theta"),
        ("qwen", {"eos_token_id": {}}, "eos_token_id"),
        ("qwen", {"eos_token_id": "x"}, "eos_token_id"),
        ("qwen", {"eos_token_id": [96]}, "eos_token_id 96 is no token of a vocabulary of 96"),
        ("qwen", {"pad_token_id": -1}, "pad_token_id"),
        ("qwen", {"quantization_config": []}, "quantization_config"),
        ("qwen", {"quantization_config": "fp8"}, "quantization_config"),
        ("qwen", {"dtype": "bfloat32"}, "dtype 'bfloat32' must be one of"),
        ("qwen", {"torch_dtype": "torch.bfloat16"}, "torch_dtype"),
        ("qwen", {"per_layer_config": {"0": {}}}, "per_layer_config"),
        ("qwen", {"attn_implementation": "someone/kernel"}, "attn_implementation"),
        ("qwen", {"attribute_map": {"hidden_size": "vocab_size"}}, "'attribute_map' is not a setting"),
        ("qwen", {"to_dict": 3}, "'to_dict' is not a setting"),
        ("qwen", {"mlp_only_layers": [0, 1]}, "all layers are dense"),
        ("glm", {"first_k_dense_replace": 2}, "first_k_dense_replace 2"),
    ],
)
def test_what_the_megatron_model_would_not_follow_is_refused_by_name(family, change, words):
    with pytest.raises(UserError, match=words):
        read_architecture(FULL[family] | change)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors", "anything"])
def test_a_folder_with_a_pipe_is_refused_before_any_library_opens_it(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(FULL["qwen"]))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}: is a pipe"):
        read_architecture(tmp_path)
