"""Conversion of every family with every kind of zero experts, both ways."""

import json

import pytest
import tiny
import torch
from families import FAMILIES
from tiny import weights_of

from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
from zeda_megatron.convert.megatron_to_hf import megatron_to_hf
from zeda_megatron.convert.verify import verify
from zeda_megatron.serving.load import load_zero_expert_model

NZ = 4
KINDS = {
    "zero": {"num_zero_experts": NZ},
    "copy": {"num_zero_experts": NZ, "zero_experts_type": "copy"},
    "learned": {"num_zero_experts": NZ, "zero_experts_type": "learned"},
    "paired": {"zero_expert_routing": "paired"},
}
FIRST = ("qwen3_moe", "glm4_moe_lite", "mixtral")
"""Families that all kinds are usual for."""
pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(
            name, kind, marks=[pytest.mark.slow] * (name not in FIRST and kind in ("copy", "learned"))
        )
        for name in FAMILIES
        for kind in KINDS
    ],
)
def test_every_bit_of_the_static_model_comes_back_and_opens_in_transformers(tmp_path, name, kind):
    static = FAMILIES[name].make()
    static.save_pretrained(tmp_path / "hf")
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", **KINDS[kind])
    assert verify(tmp_path / "hf", tmp_path / "megatron") == []
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", tmp_path / "dynamic")
    before, after = weights_of(tmp_path / "hf"), weights_of(tmp_path / "dynamic")
    for key, tensor in before.items():
        assert torch.equal(after[key][: len(tensor)], tensor), key
    added = {key.split(".")[-1] for key in after.keys() - before.keys()}
    assert added == {"learned": {"zero_bias"}, "paired": {"zero_weight", "zero_bias"}}.get(kind, set())
    wide = {key for key in before if after[key].shape != before[key].shape}
    biases = (
        () if kind == "paired" else ("e_score_correction_bias", ".router.bias")
    )  # its one more row has none
    assert wide == {key for key in before if key.endswith((".gate.weight", ".router.weight", *biases))}
    assert json.loads((tmp_path / "dynamic/config.json").read_text())["model_type"] == name
    tokens = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(5))
    dynamic = load_zero_expert_model(tmp_path / "dynamic")
    with torch.no_grad():
        if kind == "paired":  # heads without a fit skip nothing
            tiny.close(dynamic(tokens).logits, static(tokens).logits, rtol=0, atol=1e-5)
        dynamic.set_zero_mask(True)
        tiny.close(dynamic(tokens).logits, static(tokens).logits, rtol=0, atol=1e-5)
