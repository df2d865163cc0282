"""The 30B models at their real size, on the meta device: every tensor of the published folders has its place.

Names and shapes come from transformers' own classes. GLM-4.7-Flash: the defaults of `Glm4MoeLiteConfig` (transformers
5.23) are the published values; Megatron-Bridge counts 9,701 tensors in the published folder. Qwen3-30B-A3B: the values
of its config.json.
"""

import pytest
import torch
from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.convert.layout import model_layout
from zeda_megatron.models.architecture import dims_of, read_architecture, weight_map_of
from zeda_megatron.models.weight_kinds import Router

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_process")]
QWEN = dict(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    norm_topk_prob=True,
    max_position_embeddings=40960,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    tie_word_embeddings=False,
)
MODELS = {
    # class, config, zero experts of the paper, tensors on disk, parameters in billions
    "Qwen3-30B-A3B": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**QWEN), 64, 18867, 30.5),
    # 9,701 less the 210 of the multi-token-prediction layer: those of a MoE layer, and four more
    "GLM-4.7-Flash": (Glm4MoeLiteForCausalLM, Glm4MoeLiteConfig(), 32, 9701 - 210, 29.9),
}


def on_disk(model):
    """Key -> shape as saved: one tensor per expert and projection."""
    found = {}
    for name, tensor in model.state_dict().items():
        layer, _, kind = name.partition(".experts.")
        if kind == "gate_up_proj":
            experts, rows, width = tensor.shape
            for part in ("gate_proj", "up_proj"):
                found |= {f"{layer}.experts.{e}.{part}.weight": (rows // 2, width) for e in range(experts)}
        elif kind == "down_proj":
            found |= {
                f"{layer}.experts.{e}.{kind}.weight": tuple(tensor.shape[1:]) for e in range(len(tensor))
            }
        else:
            found[name] = tuple(tensor.shape)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_published_tensor_has_its_megatron_parameter_and_shape(name):
    kind, config, zero, count, billions = MODELS[name]
    with torch.device("meta"):
        wanted = on_disk(kind(config))
    assert len(wanted) == count
    parameters = sum(torch.Size(shape).numel() for shape in wanted.values())
    assert parameters / 1e9 == pytest.approx(billions, abs=0.1)
    arch = read_architecture(config.to_dict() | {"architectures": [kind.__name__]})
    layout, dims = model_layout(arch, ZeroExpertConfig(zero)), dims_of(arch)
    bound = weight_map_of(arch).bind(layout.shapes(), wanted, dims)
    seen = set()
    for parameter in layout.parameters:
        mapping = bound[parameter.name]
        for key, allowed in mapping.hf_shapes(parameter.shape, dims).items():
            assert wanted[key] in allowed, key
            seen.add(key)
            if isinstance(mapping, Router):
                assert parameter.shape[0] == wanted[key][0] + zero
    assert seen == wanted.keys()
