"""Weights of a running model by their Hugging Face names; other layouts: tests/distributed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_world
import torch
from families import FAMILIES
from safetensors.torch import load_file

from zeda_megatron.convert.megatron_to_hf import megatron_to_hf
from zeda_megatron.errors import UserError
from zeda_megatron.models.architecture import read_architecture
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


def test_adapters_are_part_of_the_weights_but_not_of_the_originals(world, tmp_path):
    flags = {"trainable": "lora", "lora_rank": 8, "teacher_memory": "shared", "lr_warmup_fraction": 0.0}
    run = tiny_world.start(world, save=tmp_path / "run", train_iters=2, **flags)
    weights = LiveWeights(run.student.chunks, run.student.arch)
    run.run()
    megatron_to_hf(tmp_path / "run", world.hf, tmp_path / "hf")
    equal(weights.tensors(), exported(tmp_path / "hf"))
    still = {key: part for key, part in weights.tensors(static=True) if not key.endswith("gate.weight")}
    equal(still, {key: part for key, part in exported(world.hf).items() if not key.endswith("gate.weight")})


EXPERTS_OF_A_LAYER = 128 * 3 * 768 * 2048 * 2
"""Bytes, at Qwen3-30B-A3B's geometry in bf16."""


@pytest.mark.slow
def test_a_hand_over_takes_less_than_the_experts_of_a_layer_beyond_what_each_side_keeps(tmp_path):
    """Two expert-parallel processes with real shapes, one layer; to an engine beside them, and to a folder."""
    script, top = Path(__file__).with_name("hand_over_memory.py"), Path(__file__).parents[2]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    environment = os.environ | {"PYTHONPATH": str(top), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, env=environment)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 2, done.stderr[-3000:]
    assert all(0 < peak[kind] < EXPERTS_OF_A_LAYER for peak in found for kind in ("engine", "server")), found


def test_experts_that_engines_want_merged_are_refused_in_one_line():
    model = tiny.megatron_model(FAMILIES["gpt_oss"].make())
    arch = read_architecture(FAMILIES["gpt_oss"].fields)
    with pytest.raises(
        UserError, match="--rollout-engine: engines want the experts of GptOssForCausalLM merged"
    ):
        LiveWeights([model], arch)
