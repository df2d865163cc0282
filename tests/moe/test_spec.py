"""Rewriting Megatron's own layer specs."""

import copy
from dataclasses import fields, is_dataclass
from functools import partial

import pytest
import tiny
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.moe.dispatch import ZeroExpertAlltoAllDispatcher, install_dispatchers
from zeda_megatron.moe.experts import GroupedExperts
from zeda_megatron.moe.router import ZeroExpertRouter
from zeda_megatron.moe.spec import apply_grouped_experts, apply_zero_experts
from zeda_megatron.runtime.megatron_api import moe_submodules

ZERO = ZeroExpertConfig(4)
MEGATRONS = {
    "aux loss": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.7},
    "per sequence": {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.7},
    "both": {
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
        "moe_aux_loss_coeff": [0.3, 0.2],
    },
    "capacity": {"moe_expert_capacity_factor": 0.5},
    "padded capacity": {"moe_expert_capacity_factor": 0.5, "moe_pad_expert_input_to_capacity": True},
    "z loss": {"moe_z_loss_coeff": 0.3},
    "plain": {},
}
STOCK = dict(num_experts=8, moe_grouped_gemm=False, normalization="RMSNorm", qk_layernorm=True)


@pytest.fixture(autouse=True)
def no_losses_of_other_models():
    """Megatron notes aux losses by layer, in a list as long as the first model's."""
    yield
    from megatron.core.transformer.moe import moe_utils

    getattr(moe_utils, "get_moe_layer_wise_logging_tracker", dict)().clear()


def described(spec):
    """A spec as plain values: newer Megatron has `functools.partial` in it, which compares by identity."""
    if isinstance(spec, partial):
        return spec.func, described(spec.args), described(spec.keywords)
    if is_dataclass(spec) and not isinstance(spec, type):
        return type(spec), {field.name: described(getattr(spec, field.name)) for field in fields(spec)}
    if isinstance(spec, dict):
        return {key: described(value) for key, value in spec.items()}
    if isinstance(spec, list | tuple):
        return [described(value) for value in spec]
    return spec


def build(config, spec):
    model = GPTModel(config, spec, vocab_size=96, max_sequence_length=64, position_embedding_type="rope")
    install_dispatchers(model)
    tiny.draw(model)
    return model


@torch.no_grad()
def logits(model):
    tokens = torch.arange(10)[None]
    return model(tokens, tokens, None)


def test_a_stock_layer_spec_gets_zero_experts_and_nothing_else_changes():
    config = tiny.megatron_config()
    stock = get_gpt_layer_local_spec(**STOCK)
    model = build(config, apply_zero_experts(stock, ZERO))
    for layer in model.decoder.layers:
        assert type(layer.mlp) is MoELayer and type(layer.mlp.experts) is SequentialMLP
        assert type(layer.mlp.router) is ZeroExpertRouter and layer.mlp.router.weight.shape == (12, 32)
        assert type(layer.mlp.token_dispatcher) is ZeroExpertAlltoAllDispatcher
    assert [layer.mlp.router.layer_number for layer in model.decoder.layers] == [1, 2]
    static = build(config, stock)
    assert all(type(layer.mlp.router) is TopKRouter for layer in static.decoder.layers)
    assert model.state_dict().keys() == static.state_dict().keys()
    assert logits(model).isfinite().all()


def test_a_block_spec_with_dense_layers_leaves_them_alone():
    config = tiny.megatron_config(num_hidden_layers=3, mlp_only_layers=[0])
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    rewritten = apply_zero_experts(block, ZERO)
    model = build(config, rewritten)
    assert [type(layer.mlp) for layer in model.decoder.layers] == [MLP, MoELayer, MoELayer]
    assert described(rewritten.layer_specs[0]) == described(block.layer_specs[0])
    assert rewritten.layer_norm is block.layer_norm


def test_a_list_of_layer_specs_stays_a_list():
    layer = get_gpt_layer_local_spec(**STOCK)
    rewritten = apply_zero_experts([layer, layer], ZERO)
    assert isinstance(rewritten, list) and len(rewritten) == 2
    assert all(moe_submodules(spec).router is not TopKRouter for spec in rewritten)


@pytest.mark.parametrize("backend", [None, "grouped_mm"])
def test_the_input_spec_is_not_modified(backend):
    config = tiny.megatron_config()
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    before = described(copy.deepcopy(block))
    apply_zero_experts(block, ZERO, backend)
    apply_zero_experts(block.layer_specs, ZERO, backend)
    apply_grouped_experts(block, "grouped_mm")
    assert described(block) == before


def test_expert_backend_replaces_the_experts_only_when_asked():
    config = tiny.megatron_config()
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    grouped, plain = (
        build(config, apply_zero_experts(block, ZERO, "grouped_mm")),
        build(config, apply_zero_experts(block, ZERO)),
    )
    assert type(grouped.decoder.layers[0].mlp.experts) is GroupedExperts
    assert type(plain.decoder.layers[0].mlp.experts) is SequentialMLP
    tiny.close(logits(grouped), logits(plain), rtol=1e-4, atol=1e-5)
    static = build(config, apply_grouped_experts(block, "grouped_mm"))
    assert type(static.decoder.layers[0].mlp.experts) is GroupedExperts
    assert type(static.decoder.layers[0].mlp.router) is TopKRouter


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kind", MEGATRONS)
def test_without_zero_experts_a_layer_is_megatrons_own_losses_and_capacity_too(kind):
    made = []
    for zero in (None, ZeroExpertConfig(0)):
        layer, hidden = tiny.moe_layer(zero, MEGATRONS[kind]).train(), tiny.hidden_states()
        output, _ = layer(hidden)
        output.square().sum().backward()
        made.append((output.detach(), hidden.grad, layer.router.weight.grad))
    assert all(torch.equal(ours, stock) for ours, stock in zip(*made, strict=True))
