"""Activations of the memory estimate against what autograd really saves, one layer at a time on the CPU."""

from __future__ import annotations

import pytest
import tiny
import torch
from families import QWEN3_5_MOE_TEXT

from zeda_megatron.config.parallel import ParallelConfig
from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.data.packing import PackedDataset, TokenSample
from zeda_megatron.distill.passes import forward_model
from zeda_megatron.models.architecture import read_architecture
from zeda_megatron.models.build import build_gpt_model, transformer_config
from zeda_megatron.planning.memory_activations import Layer, kept_per_layer

pytestmark = pytest.mark.usefixtures("one_process")
TOKENS, ZERO = 256, ZeroExpertConfig(4, group_loss_coeff=0.1)
QWEN = tiny.TINY | dict(
    hidden_size=64,
    intermediate_size=96,
    head_dim=16,
    moe_intermediate_size=48,
    max_position_embeddings=TOKENS,
)
GLM = tiny.GLM | dict(
    hidden_size=64,
    intermediate_size=160,
    q_lora_rank=24,
    kv_lora_rank=32,
    qk_nope_head_dim=12,
    qk_rope_head_dim=4,
    v_head_dim=16,
    moe_intermediate_size=48,
    max_position_embeddings=TOKENS,
)
MIXTRAL = tiny.MIXTRAL | dict(
    hidden_size=64, intermediate_size=48, head_dim=16, max_position_embeddings=TOKENS
)
HYBRID = QWEN3_5_MOE_TEXT | dict(
    hidden_size=64,
    moe_intermediate_size=48,
    shared_expert_intermediate_size=48,
    linear_key_head_dim=32,
    linear_value_head_dim=24,
    max_position_embeddings=TOKENS,
)
RECOMPUTE = {
    None: {},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}


def architecture(config: dict, layers: int, dense: int):
    if config in (MIXTRAL, HYBRID):
        return read_architecture(config | {"num_hidden_layers": layers})
    if config is QWEN:
        return read_architecture(config | {"num_hidden_layers": layers, "mlp_only_layers": [*range(dense)]})
    kinds = ["dense"] * dense + ["sparse"] * (layers - dense)
    return read_architecture(config | {"num_hidden_layers": layers, "mlp_layer_types": kinds})


def saved_bytes(arch, recompute) -> tuple[list[int], float]:
    """Bytes of the storages that every layer adds to what a forward pass holds for the backward one, parameters not
    counted, and the share of the last layer's picks that went to zero experts."""
    torch.manual_seed(0)
    overrides = RECOMPUTE[recompute] | {"moe_grouped_gemm": False}
    model = build_gpt_model(arch, transformer_config(arch, overrides=overrides), ZERO, expert_backend="loop")
    tiny.draw(model, std=0.1)
    model.train()
    batch = PackedDataset([TokenSample([1 + i % 90 for i in range(TOKENS)], [True] * TOKENS)], TOKENS, 0, 1)[
        0
    ]
    own, held, sizes, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, [], []

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = tensor  # alive, so that no other takes its address
        return tensor

    def mark(*_):
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in held.values()))

    for module in [*model.decoder.layers, model.decoder.final_layernorm]:
        module.register_forward_pre_hook(mark)
    router = model.decoder.layers[-1].mlp.router
    router.register_forward_hook(lambda module, inputs, output: kept.append(int(output[1].sum())))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward_model(model, batch)
    share = 1 - kept[0] / (TOKENS * arch.megatron["moe_router_topk"])
    return [after - before for before, after in zip(sizes, sizes[1:])], share


@pytest.mark.parametrize("recompute", [None, "full", "selective"])
@pytest.mark.parametrize(
    ("config", "dense"),
    [(QWEN, False), (QWEN, True), (GLM, False), (GLM, True), (MIXTRAL, False), (HYBRID, False)],
    ids=["qwen", "qwen dense", "glm", "glm dense", "mixtral", "gated delta network"],
)
def test_what_a_layer_keeps_is_near_the_estimate(config, recompute, dense):
    """Within 5%; with full recomputation exactly, the layer's input."""
    layer = Layer.of(architecture(config, 4, 2), ParallelConfig(), ZERO, 4, local=True)
    layers, share = saved_bytes(architecture(config, 4, 2), recompute)
    measured = (
        layers[1] if dense else layers[2] if config is HYBRID else layers[3]
    )  # each the second of its kind
    assert 0.1 < share < 0.9
    estimate = kept_per_layer(layer, recompute, TOKENS, layer.load(TOKENS, share), not dense)
    assert measured == pytest.approx(estimate, rel=0.0 if recompute == "full" else 0.05)
