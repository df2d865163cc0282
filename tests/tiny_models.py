"""Tiny Qwen3-MoE folders made with transformers, for the tests of this folder."""

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

TINY = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    norm_topk_prob=True,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


def make_hf_folder(folder, dtype=torch.float32, max_shard_size="20kB", seed=0, **changes):
    """Save a random model (all weights drawn, norms too) and a generation config; returns (folder, model)."""
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(TINY | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3)
    model = model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "tokenizer_config.json").write_text("{}\n")
    return folder, model
