"""Weights of a running model by their Hugging Face names; other layouts: tests/distributed."""

import pytest
import tiny_world
import torch
from safetensors.torch import load_file

from zeda_megatron.convert.megatron_to_hf import megatron_to_hf
from zeda_megatron.models.live_weights import LiveWeights
from zeda_megatron.models.load import load_model
from zeda_megatron.strict_json import read_json

pytestmark = pytest.mark.usefixtures("one_process")


def exported(folder):
    return {key: part for file in folder.glob("*.safetensors") for key, part in load_file(file).items()}


def equal(given, expected):
    given = dict(given)
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[key], part) for key, part in expected.items())


def test_they_are_those_of_the_export_without_zero_experts_those_of_the_original(world, tmp_path):
    megatron_to_hf(world.dynamic, world.hf, tmp_path / "hf")
    model = load_model(world.dynamic)
    weights = LiveWeights([model.chunk], model.arch)
    equal(weights.tensors(), exported(tmp_path / "hf"))
    equal(weights.tensors(static=True), exported(world.hf))
    assert weights.settings() == {}


def test_they_follow_the_model_and_its_thresholds(world, tmp_path):
    tiny_world.fit(world, tmp_path / "paired")
    model = load_model(tmp_path / "paired")
    weights = LiveWeights([model.chunk], model.arch)
    megatron_to_hf(tmp_path / "paired", world.hf, tmp_path / "hf")
    thresholds = read_json(tmp_path / "hf" / "config.json")["zce_threshold"]
    assert weights.settings() == {"zce_threshold": pytest.approx([thresholds] * 2)}
    before = {key: part.clone() for key, part in weights.tensors()}
    with torch.no_grad():
        for parameter in model.chunk.parameters():
            parameter += 1
    for key, part in weights.tensors():
        # The format wants a row after those of the experts, which nobody reads.
        rows = 8 if key.endswith("gate.weight") else None
        assert torch.equal(part[:rows], before[key][:rows] + 1), key
