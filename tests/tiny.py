"""Tiny models and their parts for the tests: made by transformers and Megatron, never by the code under test."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from transformers import (
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

TINY = dict(
    architectures=["Qwen3MoeForCausalLM"],
    model_type="qwen3_moe",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=16,
    norm_topk_prob=True,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
)
"""Geometry of all tiny models: 8 experts, top-3."""


GLM = dict(
    architectures=["Glm4MoeLiteForCausalLM"],
    model_type="glm4_moe_lite",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=12,
    kv_lora_rank=16,
    qk_nope_head_dim=10,
    qk_rope_head_dim=8,
    v_head_dim=6,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_shared_experts=1,
    moe_intermediate_size=16,
    routed_scaling_factor=1.8,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)
"""The tiny GLM-4.7-Flash: latent attention, first layer dense, 8 experts, top-3; no two sizes are equal by chance."""


def gap(mine: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, as a part of the largest wanted value where that is above 1.

    Rounding grows with the values and differs between processors, so an absolute bound fits bounded values alone.
    """
    if not wanted.numel():
        return 0.0
    mine, wanted = mine.detach().double(), wanted.detach().double()
    return float((mine - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))


def close(mine, wanted, rtol: float, atol: float, msg=None) -> None:
    """`torch.testing.assert_close`, with `atol` a part of the largest wanted value (see `gap`)."""
    if not torch.is_tensor(wanted):
        for number, (a, b) in enumerate(zip(mine, wanted, strict=True)):
            close(a, b, rtol, atol, f"{msg or 'part'} {number}")
        return
    largest = float(wanted.detach().abs().max()) if wanted.numel() else 0.0
    told = None if msg is None else lambda text: f"{msg}: {text}"
    torch.testing.assert_close(mine, wanted, rtol=rtol, atol=atol * max(largest, 1.0), msg=told)


def weights_of(folder) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder."""
    return {k: v for shard in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(shard).items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """The same names, types and bits."""
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


def drawn(model_class, config, seed: int, std: float):
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and parameter.any() else 0.0  # some norms add their weight to 1
            parameter.normal_(mean=centre, std=std)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
    model.tie_weights()
    return model.eval()


def glm_model(seed: int = 0, std: float = 0.3, **changes) -> Glm4MoeLiteForCausalLM:
    """A random GLM-4.7-Flash in which every weight is drawn, norms and score biases too."""
    return drawn(Glm4MoeLiteForCausalLM, Glm4MoeLiteConfig(**(GLM | changes)), seed, std)


MIXTRAL = dict(
    architectures=["MixtralForCausalLM"],
    model_type="mixtral",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=8,
    num_experts_per_tok=3,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    sliding_window=None,
    tie_word_embeddings=False,
)
"""The tiny Mixtral: plain grouped-query attention, 8 experts, top-3."""


def mixtral_model(seed: int = 0, std: float = 0.3, **changes) -> MixtralForCausalLM:
    """A random Mixtral in which every weight is drawn, the norms too."""
    return drawn(MixtralForCausalLM, MixtralConfig(**(MIXTRAL | changes)), seed, std)


def hf_model(seed: int = 0, std: float = 0.3, **changes) -> Qwen3MoeForCausalLM:
    """A random Qwen3-MoE in which every weight is drawn, the norms too."""
    return drawn(Qwen3MoeForCausalLM, Qwen3MoeConfig(**(TINY | changes)), seed, std)


def architecture(**changes):
    """Our reading of the tiny config."""
    from zeda_megatron.models.architecture import read_architecture

    return read_architecture(
        Qwen3MoeConfig(**(TINY | changes)).to_dict() | {"architectures": TINY["architectures"]}
    )


def megatron_config(overrides: dict | None = None, dtype: torch.dtype = torch.float32, **changes):
    """Megatron's config of the tiny model; `overrides` are Megatron's field names, `changes` Hugging Face's."""
    from zeda_megatron.models.build import transformer_config

    return transformer_config(architecture(**changes), dtype=dtype, overrides=overrides)


def draw(module: torch.nn.Module, seed: int = 0, std: float = 0.3) -> None:
    """Random values for all parameters (and expert biases), so that nothing is zero or equal by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        for name, buffer in sorted(module.named_buffers()):
            if name.endswith("expert_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)


def router(zero, overrides: dict | None = None, seed: int = 0, **changes):
    """A router with zero experts, alone, its weights drawn."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from zeda_megatron.moe.router import ZeroExpertRouter

    made = ZeroExpertRouter(megatron_config(overrides, **changes), get_default_pg_collection(), zero=zero)
    made.set_layer_number(1)
    draw(made, seed)
    return made


def moe_layer(zero=None, overrides: dict | None = None, backend: str = "loop", seed: int = 0, **changes):
    """One MoE layer of the tiny model (zero=None: Megatron's own router), its weights drawn."""
    from megatron.core.transformer.spec_utils import build_module

    from zeda_megatron.models.build import decoder_block_spec
    from zeda_megatron.moe.dispatch import install_dispatchers
    from zeda_megatron.moe.spec import apply_zero_experts

    config = megatron_config(overrides, **changes)
    block = decoder_block_spec(config)
    if zero is not None:
        block = apply_zero_experts(block, zero, backend)
    mlp = block.layer_specs[0].submodules.mlp
    # Newer versions of Megatron have a builder there.
    layer = mlp(config=config) if isinstance(mlp, partial) else build_module(mlp, config=config)
    layer.set_layer_number(1)
    install_dispatchers(layer)
    draw(layer, seed)
    return layer


def hidden_states(tokens: int = 13, seed: int = 1, size: int = TINY["hidden_size"]) -> torch.Tensor:
    """Random [S, 1, H] input that wants a gradient."""
    return torch.randn(tokens, 1, size, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def dense_routing(
    logits_TE: torch.Tensor,
    topk: int,
    num_real: int,
    kind: str = "softmax",
    bias=None,
    scale=1.0,
    groups=None,
):
    """The definition, token by token: weights [T, E] of the picks, zero experts included, not renormalised.

    kind: softmax (over the K picks), pre_softmax (over all, then top-k), sigmoid (picked by score + bias,
    weighted by score / sum of the picked scores). groups: (number, kept, best): real experts come from the kept groups
    with the largest sums of their best scores.
    """
    rows = []
    for logits_E in logits_TE:
        scores_E = {"softmax": logits_E, "pre_softmax": logits_E.softmax(0), "sigmoid": logits_E.sigmoid()}[
            kind
        ]
        ranking_E = (scores_E if bias is None else scores_E + bias).detach().tolist()
        allowed = set(range(len(ranking_E)))
        if groups is not None:
            number, kept, best = groups
            size = num_real // number
            sums = [sum(sorted(ranking_E[g * size : (g + 1) * size])[-best:]) for g in range(number)]
            for g in sorted(range(number), key=lambda g: -sums[g])[kept:]:
                allowed -= set(range(g * size, (g + 1) * size))
        picks = sorted(allowed, key=lambda e: -ranking_E[e])[:topk]
        picked_K = torch.stack([scores_E[e] for e in picks])
        if kind == "softmax":
            picked_K = picked_K.softmax(0)
        elif kind == "sigmoid":
            picked_K = picked_K / picked_K.sum()
        row = [torch.zeros(()) for _ in ranking_E]
        for e, weight in zip(picks, picked_K):
            row[e] = weight * scale
        rows.append(torch.stack(row))
    weights_TE = torch.stack(rows)
    return SimpleNamespace(
        weights_TE=weights_TE,
        map_TE=weights_TE.detach() != 0,
        real_TN=weights_TE[:, :num_real],
    )


def dense_experts(hidden_TH: torch.Tensor, weights_TN: torch.Tensor, experts: list) -> torch.Tensor:
    """Every expert on every token, weighted: sum_e w_e * fc2_e(silu(gate_e x) * up_e x). experts: (fc1, fc2)."""
    out_TH = torch.zeros_like(hidden_TH)
    for e, (fc1, fc2) in enumerate(experts):
        gate, up = (hidden_TH @ fc1.t()).chunk(2, dim=-1)
        out_TH = out_TH + weights_TN[:, e, None] * ((torch.nn.functional.silu(gate) * up) @ fc2.t())
    return out_TH


def expert_weights(layer) -> list:
    """(fc1, fc2) parameters of a layer's experts."""
    return [(e.linear_fc1.weight, e.linear_fc2.weight) for e in layer.experts.local_experts]


def hf_reader(model):
    """`read(key)` of a model in memory, with the keys that it has on disk (one tensor per expert)."""
    state = model.state_dict()

    def read(key: str) -> torch.Tensor:
        key = key.replace(".block_sparse_moe.", ".mlp.")  # Mixtral's and MiniMax' name on disk
        if ".experts." not in key:
            return state[key]
        layer, _, rest = key.partition(".experts.")
        expert, name, kind = rest.split(".")
        if f"{layer}.experts.gate_up_proj_bias" in state:  # gpt-oss: transposed, gate and up in turn
            tail = "_bias" if kind == "bias" else ""
            fused = "down_proj" if name == "down_proj" else "gate_up_proj"
            mine = state[f"{layer}.experts.{fused}{tail}"][int(expert)]
            mine = mine if tail else mine.t()
            return mine if fused == name else mine[("gate_proj", "up_proj").index(name) :: 2]
        if name in ("down_proj", "w2"):
            return state[f"{layer}.experts.down_proj"][int(expert)]
        gate, up = state[f"{layer}.experts.gate_up_proj"][int(expert)].chunk(2)
        return gate if name in ("gate_proj", "w1") else up

    return read


def megatron_model(hf, zero=None, backend: str = "auto", overrides: dict | None = None, dtype=torch.float32):
    """The Megatron model with the weights of a Hugging Face model; zero rows are drawn with a seed."""
    from zeda_megatron.models.architecture import dims_of, read_architecture, weight_map_of
    from zeda_megatron.models.build import build_gpt_model, transformer_config

    arch = read_architecture(hf.config.to_dict() | {"architectures": [type(hf).__name__]})
    model = build_gpt_model(
        arch, transformer_config(arch, dtype=dtype, overrides=overrides), zero, expert_backend=backend
    )
    weights, dims, read = weight_map_of(arch), dims_of(arch, seed=3), hf_reader(hf)
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            if torch.is_tensor(parameter) and "zero_output" not in name and ".paired." not in name:
                parameter.copy_(weights.for_mcore_name(name).to_mcore(read, parameter.shape, dims))
    return model.eval()


def watch_slots(block) -> list[tuple[int, int]]:
    """A list that every later call of a transformers MoE block's experts adds to: slots it was given, and real ones."""
    seen = []
    block.experts.register_forward_pre_hook(
        lambda experts, args: seen.append((args[1].numel(), int((args[1] < block.num_real).sum())))
    )
    return seen


def expected_slots(block, path: str, slots: int, real: int) -> list[tuple[int, int]]:
    """What `watch_slots` sees of one call: all slots where shapes are static, and the zero slots left out of the
    products, if this version of transformers has a mark for that."""
    if path != "static":
        return [(real, real)]
    return [(slots, real if hasattr(block.experts, "_is_expert_parallel") else slots)]


def splitting_threshold(model, tokens) -> list[float]:
    """A threshold for each MoE layer, which has scores on both sides of it."""
    chosen = [0.0] * len(model.moe_blocks())
    for layer in range(len(chosen)):
        for value in (half / 2 for half in range(-40, 40)):
            chosen[layer] = value
            model.set_zero_threshold(chosen)
            model.reset_zero_share()
            model(tokens)
            if 0.05 < model.zero_share()[layer] < 0.95:
                break
        else:
            raise AssertionError("no such threshold")
    return chosen


def moe_layer_weights(zero, seed: int = 0) -> dict:
    """Weights of a whole MoE layer: {"router": [N+Nz, H], "experts": [(fc1, fc2), ...]}, on any layout."""
    generator = torch.Generator().manual_seed(seed)
    hidden, width, experts = TINY["hidden_size"], TINY["moe_intermediate_size"], TINY["num_experts"]

    def weight(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    return {
        "router": weight(experts + zero.num_zero_experts, hidden),
        "experts": [(weight(2 * width, hidden), weight(hidden, width)) for _ in range(experts)],
    }
