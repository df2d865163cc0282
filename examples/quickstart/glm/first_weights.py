"""First weights of the quickstart's GLM teacher: those of its Qwen3-MoE teacher, rewritten for the other architecture.

    python examples/quickstart/glm/first_weights.py --qwen examples/quickstart/teacher \
        --config examples/quickstart/glm/teacher/config.json --out DIR

Embeddings, head, experts and norms carry over. Attention becomes latent attention: the rotary part of the shared key
holds the keys of both groups side by side. Only near enough are the norms of single heads (a constant in their place),
every second rotary frequency, and the weights of picks (sigmoid in place of softmax). The dense layer, the shared
experts and the part of keys without rotation begin with no effect. Training has to mend the rest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM

MARGIN = 2.0
"""The largest logit of a token is moved to minus this: there sigmoid is close to exp, as softmax has it."""
RIDGE = 1e-3


class Seen:
    """Root mean squares per head and inputs of the routers, over some texts."""

    def __init__(self, qwen, tokenizer, texts: list[list[dict]]):
        self.inputs: dict[str, list[torch.Tensor]] = {}
        hooks = [
            module.register_forward_hook(self._hook(name))
            for name, module in qwen.named_modules()
            if name.endswith(("q_norm", "k_norm", "mlp.gate"))
        ]
        with torch.no_grad():
            for messages in texts:
                qwen(**tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True))
        for hook in hooks:
            hook.remove()

    def _hook(self, name: str):
        return lambda module, args, output: self.inputs.setdefault(name, []).append(args[0])

    def head_scale(self, name: str) -> torch.Tensor:
        """What a norm of heads multiplies by on average, [heads]."""
        parts = [x.pow(2).mean(-1).rsqrt().reshape(-1, x.shape[-2]) for x in self.inputs[name]]
        return torch.cat(parts).mean(0)

    def rows(self, name: str) -> torch.Tensor:
        """[T, H]"""
        return torch.cat([x.reshape(-1, x.shape[-1]) for x in self.inputs[name]])


def rotary_rows(config: Glm4MoeLiteConfig, group: int, half: int) -> torch.Tensor:
    """Where the rows (0..half-1, then half..2*half-1) of a head go in the interleaved rotary part."""
    groups = config.qk_rope_head_dim // (2 * half)
    pair = torch.arange(half) * groups + group
    return torch.cat([2 * pair, 2 * pair + 1])


def rewrite_attention(
    old, new, norm_D: torch.Tensor, config: Glm4MoeLiteConfig, seen: Seen, name: str
) -> None:
    """Fill latent attention `new` from grouped-query attention `old`; norm_D: the norm before it."""
    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    size = old.head_dim
    group_of = heads // (old.k_proj.weight.shape[0] // size)
    # The latents are the normalised hidden state itself: their norm changes nothing.
    for down, norm in (
        (new.q_a_proj.weight, new.q_a_layernorm),
        (new.kv_a_proj_with_mqa.weight, new.kv_a_layernorm),
    ):
        down.zero_()
        down[: len(norm_D)] = torch.diag(1 / norm_D)
        norm.weight.copy_(norm_D)
    q = old.q_proj.weight.view(heads, size, -1) * old.q_norm.weight[:, None]
    k = old.k_proj.weight.view(-1, size, q.shape[-1]) * old.k_norm.weight[:, None]
    q = q * seen.head_scale(f"{name}.q_norm")[:, None, None] * ((nope + rope) / size) ** 0.5
    k = k * seen.head_scale(f"{name}.k_norm")[:, None, None]
    v = old.v_proj.weight.view(-1, size, q.shape[-1])
    up_q = new.q_b_proj.weight.view(heads, nope + rope, -1)
    up_q.zero_()
    up_kv = new.kv_b_proj.weight.view(
        heads, nope + config.v_head_dim, -1
    )  # keys without rotation stay random
    for head in range(heads):
        group = head // group_of
        up_q[head, nope + rotary_rows(config, group, size // 2)] = q[head]
        up_kv[head, nope:] = v[group]
    for group, rows in enumerate(k):
        new.kv_a_proj_with_mqa.weight[config.kv_lora_rank + rotary_rows(config, group, size // 2)] = rows
    new.o_proj.weight.copy_(old.o_proj.weight)


def rewrite_experts(old, new, config: Glm4MoeLiteConfig, seen: Seen, name: str) -> None:
    """Routed experts carry over; the router gets one more row in common, which changes no choice."""
    inputs_TH = seen.rows(f"{name}.gate")
    wanted_T = (inputs_TH @ old.gate.weight.t()).amax(1) + MARGIN
    gram = inputs_TH.t() @ inputs_TH
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    common_H = torch.linalg.solve(gram, inputs_TH.t() @ wanted_T)
    new.gate.weight.copy_(old.gate.weight - common_H)
    new.gate.e_score_correction_bias.zero_()
    new.experts.gate_up_proj.copy_(old.experts.gate_up_proj)
    new.experts.down_proj.copy_(old.experts.down_proj / config.routed_scaling_factor)
    new.shared_experts.down_proj.weight.zero_()


@torch.no_grad()
def rewrite(qwen, config: Glm4MoeLiteConfig, seen: Seen) -> Glm4MoeLiteForCausalLM:
    torch.manual_seed(1234)
    glm = Glm4MoeLiteForCausalLM(config).float()
    first = glm.model.layers[0]
    first.self_attn.o_proj.weight.zero_()
    first.mlp.down_proj.weight.zero_()
    glm.model.embed_tokens.weight.copy_(qwen.model.embed_tokens.weight)
    glm.lm_head.weight.copy_(qwen.lm_head.weight)
    glm.model.norm.weight.copy_(qwen.model.norm.weight)
    for number, (old, new) in enumerate(zip(qwen.model.layers, glm.model.layers[1:], strict=True)):
        name = f"model.layers.{number}"
        new.input_layernorm.weight.copy_(old.input_layernorm.weight)
        new.post_attention_layernorm.weight.copy_(old.post_attention_layernorm.weight)
        norm_D = old.input_layernorm.weight
        rewrite_attention(old.self_attn, new.self_attn, norm_D, config, seen, f"{name}.self_attn")
        rewrite_experts(old.mlp, new.mlp, config, seen, f"{name}.mlp")
    return glm


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--qwen", type=Path, required=True, help="HF folder of the Qwen3-MoE teacher")
    parser.add_argument("--config", type=Path, required=True, help="config.json of the GLM teacher")
    prompts = Path(__file__).resolve().parents[1] / "data" / "prompts.jsonl"
    parser.add_argument("--texts", type=Path, default=prompts, help="what norms and routers are shown")
    parser.add_argument("--number", type=int, default=300, help="texts to take")
    parser.add_argument("--out", type=Path, required=True, help="HF folder to write")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.qwen)
    qwen = AutoModelForCausalLM.from_pretrained(args.qwen, dtype=torch.float32).eval()
    lines = args.texts.read_text(encoding="utf-8").splitlines()[: args.number]
    rows = [json.loads(line) for line in lines]
    texts = [[*row["prompt"], {"role": "assistant", "content": row["label"]}] for row in rows]
    fields = json.loads(args.config.read_text())
    glm = rewrite(qwen, Glm4MoeLiteConfig(**fields), Seen(qwen, tokenizer, texts))
    glm.save_pretrained(args.out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(args.qwen / name, args.out / name)
    shutil.copy(args.config, args.out / "config.json")
    print(f"{args.out}: {sum(p.numel() for p in glm.parameters()):,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
