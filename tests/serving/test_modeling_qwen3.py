"""The transformers modeling file against a naive dense loop and against the stock model."""

import copy
import json

import pytest
import tiny
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import zeda_megatron.serving.transformers.modeling_qwen3_moe_zero as modeling
from zeda_megatron.serving.load import load_zero_expert_model

N, NZ, K = 8, 4, 3


def make_config(**changes):
    fields = dict(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=N,
        num_experts_per_tok=K,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        max_position_embeddings=64,
        mlp_only_layers=[1],
        zce_nums=[NZ],
        zce_types=["zero"],
        use_zce_mask=False,
        pad_token_id=0,
        architectures=["Qwen3MoePlusPlusForCausalLM"],
    )
    return Qwen3MoeConfig(**(fields | changes))


def make_model(experts="grouped_mm", **changes):
    torch.manual_seed(0)
    model = modeling.Qwen3MoePlusPlusForCausalLM._from_config(
        make_config(**changes), experts_implementation=experts
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def naive_moe(block, hidden_BSH, renormalise=True):
    """One token at a time, straight from the paper: top-K of N+Nz, softmax, drop zero slots, weighted sum."""
    weight, zero_bias = block.gate.weight, getattr(block.gate, "zero_bias", None)
    out = torch.zeros_like(hidden_BSH)
    for b in range(hidden_BSH.shape[0]):
        for s in range(hidden_BSH.shape[1]):
            x = hidden_BSH[b, s]
            logits = weight @ x
            best = sorted(range(len(logits)), key=lambda e: -logits[e].item())[:K]
            exps = [
                torch.exp(logits[e] - logits.max()) for e in (best if renormalise else range(len(logits)))
            ]
            for e in best:
                w = torch.exp(logits[e] - logits.max()) / sum(exps)
                if e < N:
                    gate, up = (block.experts.gate_up_proj[e] @ x).chunk(2)
                    y = block.experts.down_proj[e] @ (gate * torch.sigmoid(gate) * up)
                elif block.gate.zero.kind == "copy":
                    y = x
                elif block.gate.zero.kind == "learned":
                    y = zero_bias[e - N]
                else:
                    continue
                out[b, s] += w * y
    return out


@pytest.mark.parametrize("kind", ["zero", "copy", "learned"])
@pytest.mark.parametrize("path", ["grouped_mm", "eager", "static"])
@torch.no_grad()
def test_block_equals_a_naive_loop_over_tokens_and_experts(kind, path):
    model = make_model("eager" if path == "eager" else "grouped_mm", zce_types=[kind])
    block = model.moe_blocks()[0]
    block.static_shapes = path == "static"
    hidden = torch.randn(2, 7, 32)
    expected = naive_moe(block, hidden)
    assert (expected - block(hidden)).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_without_norm_topk_prob_weights_are_those_of_the_full_softmax():
    block = make_model(norm_topk_prob=False).moe_blocks()[0]
    hidden = torch.randn(1, 5, 32)
    expected = naive_moe(block, hidden, renormalise=False)
    assert (expected - block(hidden)).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
@torch.no_grad()
def test_zero_slots_reach_no_expert(experts):
    model = make_model(experts)
    block = model.moe_blocks()[0]
    slots = tiny.watch_slots(block)
    hidden = torch.randn(1, 20, 32)
    block(hidden)
    ids = (hidden[0] @ block.gate.weight.T).topk(K).indices
    real = (ids < N).sum().item()
    assert slots == [(real, real)]
    assert real < 20 * K


@torch.no_grad()
def test_tokens_with_only_zero_slots_get_exactly_zero():
    block = make_model().moe_blocks()[0]
    hidden = torch.rand(1, 4, 32) + 0.1
    block.gate.weight[:N] = -1.0
    block.gate.weight[N:] = 1.0
    assert torch.equal(block(hidden), torch.zeros_like(hidden))


@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
@torch.no_grad()
def test_masked_model_equals_stock_transformers_bit_for_bit(experts):
    dynamic = make_model(experts, use_zce_mask=True)
    stock = Qwen3MoeForCausalLM._from_config(make_config(), experts_implementation=experts).eval()
    state = dynamic.state_dict()
    for name, weight in state.items():
        if name.endswith("mlp.gate.weight"):
            state[name] = weight[:N]
    stock.load_state_dict(state)
    tokens = torch.randint(1, 96, (2, 11))
    assert torch.equal(dynamic(tokens).logits, stock(tokens).logits)
    dynamic.set_zero_mask(False)
    assert not torch.equal(dynamic(tokens).logits, stock(tokens).logits)


@torch.no_grad()
def test_generation_with_cache_equals_generation_without():
    model = make_model()
    prompt = torch.randint(1, 96, (1, 6))
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
    with_cache = model.generate(prompt, use_cache=True, **options)
    without = prompt
    for _ in range(12):
        without = torch.cat([without, model(without).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(with_cache, without)


@torch.no_grad()
def test_left_padding_changes_neither_tokens_nor_zero_share():
    model = make_model()
    prompt = torch.randint(1, 96, (1, 6))
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    share = model.zero_share()
    assert all(0 < value < 1 for value in share)
    model.reset_zero_share()
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt], dim=1)
    mask = (torch.arange(9) >= 3).long().unsqueeze(0)
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 3:], alone)
    assert model.zero_share() == share


@torch.no_grad()
def test_zero_share_is_the_share_of_router_picks():
    model = make_model()
    inputs = []
    blocks = model.moe_blocks()
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args: inputs.append((module, args[0])))
    model(torch.randint(1, 96, (2, 9)))
    expected = [((x @ block.gate.weight.T).topk(K).indices >= N).float().mean().item() for block, x in inputs]
    assert model.zero_share() == pytest.approx(expected)
    model.reset_zero_share()
    assert model.zero_share() == [0.0] * len(blocks)


def test_gradients_equal_those_of_the_naive_loop():
    block = make_model(zce_types=["learned"]).moe_blocks()[0]
    twin = copy.deepcopy(block)
    hidden = torch.randn(1, 6, 32)
    target = torch.randn(1, 6, 32)
    (block(hidden) * target).sum().backward()
    (naive_moe(twin, hidden) * target).sum().backward()
    for (name, a), (_, b) in zip(block.named_parameters(), twin.named_parameters()):
        assert (a.grad - b.grad).abs().max() <= 1e-5 * b.grad.abs().max().clamp(min=1), name


@pytest.mark.parametrize("kind", ["zero", "learned"])
@torch.no_grad()
def test_saved_model_has_per_expert_keys_and_reloads_bit_equal(tmp_path, kind):
    model = make_model(zce_types=[kind])
    model.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert "model.layers.0.mlp.experts.7.down_proj.weight" in keys
    assert "model.layers.1.mlp.gate_proj.weight" in keys
    assert ("model.layers.0.mlp.gate.zero_bias" in keys) == (kind == "learned")
    again = load_zero_expert_model(tmp_path)
    tokens = torch.randint(1, 96, (1, 8))
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_authors_model_type_is_read_as_the_native_one(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "qwen3_moe_plus_plus"
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = torch.randint(1, 96, (1, 8))
    assert torch.equal(load_zero_expert_model(tmp_path)(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_stock_class_refuses_a_dynamic_checkpoint(tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        Qwen3MoeForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"zce_types": ["constant"]}, {"zce_nums": None}, {"zce_nums": [2, 2], "zce_types": ["zero", "copy"]}],
)
def test_unsupported_configs_are_refused_by_name(changes):
    with pytest.raises(ValueError, match="zce_nums"):
        modeling.Qwen3MoePlusPlusForCausalLM(make_config(**changes))
