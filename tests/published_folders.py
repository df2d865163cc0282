"""Folders as they are published, made of tiny Qwen3-MoE models by the definitions of their formats."""

import tiny
import torch
from corruptions import edit_json
from odd_folders import single
from tiny import weights_of
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

SMALL = dict(num_experts=4, num_experts_per_tok=2, num_hidden_layers=2)
EXPERT = "model.layers.0.mlp.experts.1.up_proj.weight"
SCALE = EXPERT + "_scale_inv"
MERGED = "model.layers.0.mlp.experts.gate_up_proj"


def plain(folder, **changes):
    """A Qwen3-MoE of bf16 weights, saved by transformers in one file."""
    tiny.hf_model(**(SMALL | changes)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def told(folder, **quantization):
    edit_json("config.json", lambda config: config | {"quantization_config": quantization})(folder)


def expanded(scales, block, shape):
    """Each weight's scale, one by one."""
    return torch.tensor(
        [[float(scales[r // block[0], c // block[1]]) for c in range(shape[1])] for r in range(shape[0])]
    )


def fp8(folder, block=(16, 16), scale_type=torch.float32):
    """Quantise a plain folder as DeepSeek does; returns what its matrices are worth, by the definition."""
    weights, values = weights_of(folder), {}
    for key in [key for key in weights if "_proj." in key]:
        weight = weights[key].float()
        rows, columns = (range(0, size, step) for size, step in zip(weight.shape, block))
        blocks = [[weight[r : r + block[0], c : c + block[1]] for c in columns] for r in rows]
        scales = torch.tensor([[float(one.abs().max()) / 448 for one in row] for row in blocks]).to(
            scale_type
        )
        factors = expanded(scales.float(), block, weight.shape)
        weights[key] = (weight / factors).clamp(-448, 448).to(torch.float8_e4m3fn)
        weights[f"{key}_scale_inv"] = scales
        values[key] = (weights[key].float() * factors).to(torch.bfloat16)
    single(folder, weights)
    told(folder, quant_method="fp8", weight_block_size=list(block), fmt="e4m3", activation_scheme="dynamic")
    return weights, values


def mxfp4(folder, experts=4, hidden=32, width=32, layers=2, more=None):
    """Experts of random bits; returns {fused name: what transformers makes of it, [E, in, out]}."""
    draw, weights, theirs = torch.Generator().manual_seed(3), weights_of(folder), {}
    weights = {key: value for key, value in weights.items() if ".experts." not in key}
    for layer in range(layers):
        for name, rows, columns in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
            key = f"model.layers.{layer}.mlp.experts.{name}"
            blocks = torch.randint(256, (experts, rows, columns // 32, 16), generator=draw, dtype=torch.uint8)
            scales = torch.randint(255, blocks.shape[:-1], generator=draw, dtype=torch.uint8)
            weights |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
            theirs[key] = convert_moe_packed_tensors(blocks, scales)
    single(folder, weights | (more or {}))
    told(folder, quant_method="mxfp4", modules_to_not_convert=["lm_head"])
    return theirs
