"""GPU checks on slices of the real models: one MoE layer at full size, random weights, the quickstart's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from zeda_megatron.models.architecture import read_architecture
from zeda_megatron.models.hf_config import copy_side_files

from .kernels import CPU, worst_difference

SLICES = {
    "qwen3_30b_a3b": {"num_hidden_layers": 1},
    "glm_4_7_flash": {"num_hidden_layers": 2, "num_nextn_predict_layers": 0},
}
"""Recipe to what is cut away from its config.json: all layers but one MoE layer (GLM's first layer is dense)."""
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 2048,
    "head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 8192,
}
"""Sizes for the walk without a GPU."""
_ROWS = ("--seq-length", "4096", "--global-batch-size", "8", "--bf16")
_TINY_ROWS = ("--seq-length", "512", "--global-batch-size", "2", "--bf16")


def write_slice(run, recipe: str) -> Path:
    """A Hugging Face folder with transformers' initial weights in bf16. run: a `gpu_validate.Validation`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    about = json.loads((run.root / "examples" / recipe / "config.json").read_text())
    sizes = {} if run.device == "cuda" else {key: value for key, value in _TINY.items() if key in about}
    if "num_key_value_heads" in about and sizes:
        sizes["num_key_value_heads"] = 4
    sizes |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # the tokenizer is another one
    config = AutoConfig.for_model(**about | SLICES[recipe] | sizes)
    torch.manual_seed(0)
    with torch.device(run.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder = run.work / recipe / "hf"
    model.save_pretrained(folder)
    copy_side_files(run.quickstart / "teacher", folder)
    return folder


def real_slice(run, recipe: str) -> dict:
    """Stage 1 in bf16 with each backend of the experts, stage 2, and the same evaluation here and on the CPU."""
    folder = write_slice(run, recipe)
    zero = read_architecture(folder).megatron["num_moe_experts"] // 2
    start = f"{recipe}/start"
    run.import_hf(folder, start, "--num-zero-experts", str(zero))
    rows = _ROWS if run.device == "cuda" else _TINY_ROWS
    runs, speed = {}, {}
    for backend in backends(run):
        lines = run.train(f"{recipe}/{backend}", *rows, "--expert-backend", backend, start=start, saves=False)
        runs[backend] = lines
        steps = lines[2:]  # the first ones warm up
        speed[f"{backend}_tokens_per_second"] = sum(line["tokens_per_second"] for line in steps) / len(steps)
        speed[f"{backend}_peak_gib"] = lines[-1]["peak_memory_gib"]
    first = next(iter(runs.values()))
    worst = max(worst_difference(lines, first) for lines in runs.values())
    stage2 = (
        "--config",
        str(run.quickstart / "stage2.yaml"),
        "--teacher-load",
        str(run.work / start),
        "--bf16",
    )
    stage2 += ("--data-path", str(run.work / "prompts.jsonl"), "--max-new-tokens", "32")
    gap = max(
        abs(line["logp_gap"]) for line in run.train(f"{recipe}/2", *stage2, start=start, steps=2, saves=False)
    )
    here, there = (evaluated(run, start, device)["eval_ce"] for device in (run.device, "cpu"))
    apart = abs(here - there) / there
    return {
        "ok": worst < 2e-2 and gap < 0.05 and apart < 1e-3,
        "backends_apart": worst,
        "stage2_logp_gap": gap,
        "ce_apart_from_cpu": apart,
        **speed,
    }


def backends(run) -> list[str]:
    """Ways to run the experts here: torch's grouped product, and this project's kernels where they were built."""
    from zeda_megatron.ops.expert_kernels import why_not

    own = run.device == "cuda" and not why_not(torch.device("cuda", 0), torch.bfloat16)
    return ["grouped_mm", "kernels"] if own else ["grouped_mm"]


def evaluated(run, start: str, device: str) -> dict:
    """Figures of `--stage eval` in fp32 on a device."""
    place = {} if device == "cuda" else CPU | {"OMP_NUM_THREADS": "8"}
    output = run.work / f"eval_{start.replace('/', '_')}_{device}.json"
    run.command(
        *("bash", str(run.root / "launch" / "pretrain_zeda.sh"), "--stage", "eval"),
        *("--pretrained-checkpoint", str(run.work / start), "--teacher-load", str(run.work / start)),
        *("--eval-data-path", str(run.work / "rollouts.jsonl"), "--eval-rows", "2", "--seq-length", "512"),
        *("--eval-output", str(output)),
        env={"NPROC_PER_NODE": "1", **place},
    )
    return json.loads(output.read_text())
