"""FLOP and parameter counts against transformers' models, torch's FLOP counter and the paper's figures."""

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.errors import UserError
from zeda_megatron.planning.cost_sheet import (
    GPUS,
    Gpu,
    decode_seconds,
    distinct_experts,
    gpu,
    main,
    predict,
    prefill_seconds,
)
from zeda_megatron.planning.flops import Geometry, flop_ratio, flops_per_token

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY_QWEN = {
    "model_type": "qwen3_moe",
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 3,
    "mlp_only_layers": [1],
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "vocab_size": 120,
    "tie_word_embeddings": False,
}
TINY_GLM = {
    "model_type": "glm4_moe_lite",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "q_lora_rank": 20,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "routed_scaling_factor": 1.8,
    "vocab_size": 120,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
TINY_MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 120,
    "tie_word_embeddings": False,
}
VARIANTS = {
    "mixtral": TINY_MIXTRAL,
    "qwen": TINY_QWEN,
    "qwen, tied, every second layer": {
        **TINY_QWEN,
        "tie_word_embeddings": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 2,
    },
    "glm": TINY_GLM,
    "glm, no query latent": {**TINY_GLM, "q_lora_rank": None},
    "glm, two dense layers": {**TINY_GLM, "mlp_layer_types": ["dense", "dense", "sparse"]},
    **{
        f"{name}, {variant}": family.fields | changes
        for name, family in FAMILIES.items()
        for variant, changes in family.variants.items()
    },
}


def hf_model(config: dict, device: str):
    kind = dict(config)
    hf = AutoConfig.for_model(kind.pop("model_type"), **kind)
    hf._attn_implementation, hf._experts_implementation = "eager", "eager"
    with torch.device(device):
        return AutoModelForCausalLM.from_config(hf)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_count_is_that_of_the_transformers_model(name):
    model = hf_model(VARIANTS[name], "meta")
    assert Geometry.from_config(VARIANTS[name]).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("example", ["qwen3_30b_a3b", "glm_4_7_flash"])
def test_committed_geometry_has_the_parameters_of_the_real_model(example):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(EXAMPLES / example))
    assert Geometry.read(EXAMPLES / example).parameters == sum(p.numel() for p in model.parameters())


def test_a_widened_checkpoint_counts_its_zero_rows_and_nothing_else():
    wide = Geometry.from_config({**TINY_QWEN, "zce_nums": [4]})
    plain = Geometry.from_config(TINY_QWEN)
    assert wide.parameters - plain.parameters == 2 * 4 * 48  # two MoE layers, four rows, hidden 48
    assert flops_per_token(wide, 16).routed_experts == flops_per_token(plain, 16).routed_experts


@pytest.mark.parametrize("config", [TINY_QWEN, TINY_GLM], ids=["qwen", "glm"])
def test_every_part_has_the_flops_that_torch_counts_in_a_real_forward_pass(config):
    tokens = 24
    model = hf_model(config, "cpu").eval()
    with torch.no_grad(), FlopCounterMode(display=False, depth=6) as counter:
        model(input_ids=torch.arange(tokens)[None] % config["vocab_size"], use_cache=False)
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}

    def measured(*suffixes: str) -> float:
        return sum(count for name, count in counts.items() if name.endswith(suffixes)) / tokens

    geometry = Geometry.from_config(config)
    ours = flops_per_token(geometry, keys=tokens)  # eager attention computes the full square
    assert ours.routed_experts == measured(".experts")
    assert ours.router == measured(".gate")
    assert ours.lm_head == measured(".lm_head")
    assert ours.attention_projections + ours.attention_scores == measured(".self_attn")
    assert ours.attention_projections == measured("_proj", "_proj_with_mqa") - measured(
        ".gate_proj", ".up_proj", ".down_proj"
    )
    assert ours.shared_experts == measured(".shared_experts")
    assert ours.dense_mlp == measured(".mlp") - ours.routed_experts - ours.router - ours.shared_experts
    rotary = measured(".rotary_emb")  # positions times frequencies, a product in name only
    assert ours.total == pytest.approx(counts["Global"] / tokens - rotary)


def test_expert_flops_fall_by_the_zero_share_when_the_slots_are_dropped():
    model = hf_model(TINY_QWEN, "cpu")
    geometry = Geometry.from_config(TINY_QWEN)
    experts = model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(0)
    picks_TK = torch.rand(40, 8, generator=generator).topk(3).indices
    dropped_TK = torch.rand(40, 3, generator=generator) < 0.4
    picks_TK[dropped_TK] = geometry.experts  # the index transformers' experts skip
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        experts(torch.randn(40, 48), picks_TK, torch.rand(40, 3))
    zero_share = dropped_TK.float().mean().item()
    assert 0.2 < zero_share < 0.6
    ours = flops_per_token(geometry, 16, zero_share).routed_experts * 40 / geometry.moe_layers
    assert ours == pytest.approx(counter.get_total_flops(), rel=1e-6)


@pytest.mark.parametrize(
    ("phase", "length", "paper"),
    [("prefill", 1024, 1.40), ("prefill", 8192, 1.18), ("decode", 1024, 1.44), ("decode", 8192, 1.26)],
)
def test_flop_theory_of_the_paper_is_reproduced(phase, length, paper):
    """arXiv 2605.18643, "FLOP theory" for Qwen3-30B-A3B at zero share .5; conventions as in flops.py."""
    keys = length if phase == "prefill" else length / 2
    ratio = flop_ratio(
        Geometry.read(EXAMPLES / "qwen3_30b_a3b"), keys, 0.5, zero=ZeroExpertConfig(64), lm_head=False
    )
    assert round(ratio, 2) == paper


def test_a_zero_share_of_nothing_changes_nothing_and_of_everything_leaves_no_expert_flops():
    geometry = Geometry.from_config(TINY_GLM)
    assert flop_ratio(geometry, 100, 0.0, ZeroExpertConfig()) == 1.0
    none_left = flops_per_token(geometry, 100, zero_share=1.0)
    assert none_left.routed_experts == 0.0
    assert none_left.shared_experts == flops_per_token(geometry, 100).shared_experts


def test_cost_sheet_prints_valid_json_and_a_table_with_the_same_speedup(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(TINY_QWEN))
    flags = [
        "--hf",
        str(tmp_path),
        "--zero-share",
        "0.25",
        "--batch",
        "2",
        "--tokens",
        "64",
        "--context",
        "32",
    ]
    assert main([*flags, "--json"]) == 0
    sheet = json.loads(capsys.readouterr().out)
    assert sheet["expert_flops"] == pytest.approx(0.75)
    assert [line["phase"] for line in sheet["roofline"]] == ["decode", "prefill"]
    assert main(flags) == 0
    table = capsys.readouterr().out
    assert f"{sheet['roofline'][0]['speedup']:.2f}x" in table
    # Units fit a small model too.
    assert f"{sheet['parameters']['total'] / 1e6:.2f} M" in table and "[MFLOP]" in table
    assert f"{sheet['weight_bytes']['total'] / 1e6:.1f} MB bf16" in table and " 0.00 " not in table


def test_a_large_model_is_told_in_large_units(capsys):
    assert main(["--hf", str(EXAMPLES / "qwen3_30b_a3b")]) == 0
    table = capsys.readouterr().out
    assert "parameters 30.53 B" in table and "61.1 GB bf16" in table and "[GFLOP]" in table


@pytest.mark.parametrize(
    ("content", "flags", "word"),
    [
        (None, [], "config.json"),
        ("{", [], "cannot be read as JSON"),
        (json.dumps({"model_type": "gpt2"}), [], "gpt2"),
        (json.dumps({k: v for k, v in TINY_GLM.items() if k != "kv_lora_rank"}), [], "kv_lora_rank"),
        (json.dumps(TINY_QWEN), ["--zero-share", "1.5"], "--zero-share"),
        (json.dumps(TINY_QWEN), ["--gpu", "abacus"], "abacus"),
        (json.dumps(TINY_QWEN), ["--context", "0"], "--context"),
        (json.dumps(TINY_QWEN), ["--tflops", "-3"], "--tflops"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path, content, flags, word):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=word) as error:
        main(["--hf", str(tmp_path), *flags])
    assert "\n" not in str(error.value)


QWEN = Geometry.read(EXAMPLES / "qwen3_30b_a3b")
GLM = Geometry.read(EXAMPLES / "glm_4_7_flash")


@pytest.mark.parametrize(("tokens", "zero_share"), [(1, 0.0), (8, 0.5), (32, 0.25), (64, 0.5)])
def test_distinct_experts_match_a_simulated_uniform_router(tokens, zero_share):
    generator = torch.Generator().manual_seed(1)
    hits = []
    for _ in range(300):
        picks_TK = torch.rand(tokens, QWEN.experts, generator=generator).topk(QWEN.topk).indices
        kept = picks_TK[torch.rand(tokens, QWEN.topk, generator=generator) >= zero_share]
        hits.append(kept.unique().numel())
    simulated = sum(hits) / len(hits)
    assert distinct_experts(QWEN, tokens, zero_share) == pytest.approx(simulated, rel=0.03, abs=0.15)


def test_one_decoded_token_reads_the_active_weights_once():
    device = Gpu("slow memory", flops=1e30, bandwidth=1e12, source="invented")
    parts = decode_seconds(QWEN, device, batch=1, context=1)
    # All matrices but the embedding (one row of it is read); norms and biases are not counted.
    norms = QWEN.hidden * (2 * QWEN.layers + 1) + QWEN.layers * QWEN.attention.others
    weights = 2 * (QWEN.active_parameters() - norms - QWEN.hidden * QWEN.vocabulary)
    assert sum(parts.values()) * 1e12 == pytest.approx(weights, rel=2e-3)


def test_a_large_prefill_on_a_gpu_with_free_memory_is_its_flops():
    device = Gpu("free memory", flops=1e12, bandwidth=1e30, source="invented")
    parts = prefill_seconds(
        QWEN, device, tokens=8192, context=8192, zero_share=0.5, zero=ZeroExpertConfig(64)
    )
    assert parts["routed_experts"] == pytest.approx(8192 * 2 * 48 * 4 * 3 * 2048 * 768 / 1e12)
    assert parts["attention_scores"] == pytest.approx(8192 * 2 * 48 * 2 * 4096 * 4096.5 / 1e12)
    assert parts["lm_head"] == pytest.approx(2 * 2048 * 151936 / 1e12)


@pytest.mark.parametrize("geometry", [QWEN, GLM], ids=["qwen", "glm"])
def test_speedup_vanishes_when_every_expert_is_read_anyway(geometry):
    small, large = predict(
        geometry, GPUS["h100"], 0.5, ZeroExpertConfig(geometry.experts // 2), 4096, (8, 512), ()
    )
    assert small.speedup > 1.5
    assert large.speedup == pytest.approx(1.0, abs=0.005)
    assert large.dynamic_experts == pytest.approx(geometry.experts, rel=0.001)


def test_prediction_at_the_papers_batch_is_near_and_not_below_the_measured_speedup():
    """Measured there: 1.25x to 1.19x (Qwen), 1.22x to 1.19x (GLM) in decoding, one H200, 32 at a time."""
    for geometry, zero_share, measured in ((QWEN, 0.512, 1.25), (GLM, 0.53, 1.22)):
        (line,) = predict(
            geometry, GPUS["h200"], zero_share, ZeroExpertConfig(geometry.experts // 2), 2048, (32,), ()
        )
        assert measured <= line.speedup < measured + 0.15


def test_given_rates_replace_those_of_the_datasheet():
    assert gpu("H100").flops == GPUS["h100"].flops
    half = gpu("h100", flops=400e12)
    assert (half.flops, half.bandwidth) == (400e12, GPUS["h100"].bandwidth)
    assert "by hand" in half.source
    assert gpu("my card", 1e14, 1e12).name == "my card"


def test_heads_and_stand_ins_of_paired_zero_experts_are_charged(capsys):
    """At Qwen3-30B-A3B's geometry: h(H+N)/(3KHF) for 64 hidden units, s(2r+1)/(3F) for rank 16."""
    flags = ["--hf", str(EXAMPLES / "qwen3_30b_a3b"), "--zero-share", "0.5", "--json"]
    assert main([*flags, "--paired", "--paired-head-width", "64", "--stand-in-rank", "16"]) == 0
    awake = json.loads(capsys.readouterr().out)
    head = (128 * 2048 + 64 * (2048 + 128)) / (3 * 8 * 2048 * 768)
    assert awake["expert_flops"] == pytest.approx(0.5 + head + 0.5 * 33 / (3 * 768))
    assert main([*flags, "--paired", "--paired-head-width", "64"]) == 0  # with the rank of a fit
    assert json.loads(capsys.readouterr().out)["expert_flops"] == awake["expert_flops"]
    assert main([*flags, "--paired", "--stand-in-rank", "0"]) == 0
    silent = json.loads(capsys.readouterr().out)
    assert silent["expert_flops"] == pytest.approx(0.5 + 128 / (3 * 8 * 768))
    assert silent["flops_per_token"]["dynamic"]["stand_ins"] == 0
    assert main([*flags[:-1], "--paired", "--stand-in-rank", "16"]) == 0
    shown = [
        line.split("  ")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")
    ]
    assert {"heads", "stand ins", "routed experts"} <= set(shown) and "shared experts" not in shown
    assert awake["flop_ratio"] < silent["flop_ratio"] > 1
    for mine, wanted in zip(awake["roofline"], silent["roofline"]):
        assert mine["dynamic_ms"] > wanted["dynamic_ms"] and mine["static_ms"] == wanted["static_ms"]
