"""The transformers modeling file of GLM-4.7-Flash against a naive loop and against the stock model."""

import json

import pytest
import tiny
import torch
from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM

import zeda_megatron.serving.transformers.modeling_glm4_moe_lite_zero as modeling
from zeda_megatron.serving.load import load_zero_expert_model

N, NZ, K = 8, 4, 3


def make_config(**changes):
    fields = tiny.GLM | {"zce_nums": [NZ], "zce_types": ["zero"], "use_zce_mask": False, "pad_token_id": 0}
    return Glm4MoeLiteConfig(**(fields | changes))


def make_model(experts="grouped_mm", **changes):
    torch.manual_seed(0)
    model = modeling.Glm4MoeLitePlusPlusForCausalLM._from_config(
        make_config(**changes), experts_implementation=experts
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for block in model.moe_blocks():
        block.gate.e_score_correction_bias.normal_(std=0.2)
    return model.eval()


def naive_moe(block, hidden_BSH):
    """The definition, with every expert on every token."""
    gate, flat = block.gate, hidden_BSH.reshape(-1, 32)
    routed = tiny.dense_routing(
        flat @ gate.weight.t(), K, N, "sigmoid", gate.e_score_correction_bias, gate.routed_scaling_factor
    )
    experts = list(zip(block.experts.gate_up_proj, block.experts.down_proj))
    out = tiny.dense_experts(flat, routed.real_TN, experts).view_as(hidden_BSH)
    return out + block.shared_experts(hidden_BSH), routed.map_TE


@pytest.mark.parametrize("path", ["grouped_mm", "eager", "static"])
@torch.no_grad()
def test_block_equals_the_definition_and_zero_slots_reach_no_expert(path):
    block = make_model("eager" if path == "eager" else "grouped_mm").moe_blocks()[0]
    block.static_shapes = path == "static"
    slots = tiny.watch_slots(block)
    hidden = torch.randn(2, 7, 32)
    expected, map_TE = naive_moe(block, hidden)
    assert (expected - block(hidden)).abs().max() < 1e-5 * expected.abs().max()
    real = int(map_TE[:, :N].sum())
    assert real < 14 * K and slots == tiny.expected_slots(block, path, 14 * K, real)


@torch.no_grad()
def test_tokens_with_only_zero_slots_get_the_shared_expert_alone():
    block = make_model().moe_blocks()[0]
    block.gate.e_score_correction_bias[N:] = 10.0
    hidden = torch.randn(1, 4, 32)
    assert torch.equal(block(hidden), block.shared_experts(hidden))


@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
@torch.no_grad()
def test_masked_model_equals_stock_transformers_bit_for_bit(experts):
    dynamic = make_model(experts, use_zce_mask=True)
    stock = Glm4MoeLiteForCausalLM._from_config(make_config(), experts_implementation=experts).eval()
    state = dynamic.state_dict()
    for name, weight in state.items():
        if name.endswith(("mlp.gate.weight", "e_score_correction_bias")):
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
    made = model.generate(prompt, use_cache=True, max_new_tokens=12, do_sample=False, eos_token_id=None)
    without = prompt
    for _ in range(12):
        without = torch.cat([without, model(without).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, without)


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
def test_the_dial_moves_the_zero_share_and_is_saved(tmp_path):
    model, tokens = make_model(), torch.randint(1, 96, (2, 9))
    shares = []
    for value in (-2.0, 0.0, 2.0):
        model.set_zero_logit_bias(value)
        model.reset_zero_share()
        model(tokens)
        shares.append(sum(model.zero_share()))
    assert shares[0] < shares[1] < shares[2]
    model.save_pretrained(tmp_path)
    again = load_zero_expert_model(tmp_path)
    assert again.moe_blocks()[0].gate.dials.logit_bias == 2.0
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    with pytest.raises(ValueError, match="zce_logit_bias nan"):
        model.set_zero_logit_bias(float("nan"))


@torch.no_grad()
def test_authors_model_type_is_read_as_the_native_one(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "glm4_moe_lite_plus_plus"
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = torch.randint(1, 96, (1, 8))
    assert torch.equal(load_zero_expert_model(tmp_path)(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    "changes",
    [{"zce_types": ["other"]}, {"zce_nums": None}, {"zce_routing": "paired"}, {"zce_nums": [2, 2]}],
)
def test_unsupported_configs_are_refused_by_name(changes):
    with pytest.raises(ValueError, match="zce_nums"):
        modeling.Glm4MoeLitePlusPlusForCausalLM(make_config(**changes))
