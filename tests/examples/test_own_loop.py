"""A training loop of anyone's, with zero experts: examples/own_loop.py, and the names it is made of."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import zeda_megatron as zm

ROOT = Path(__file__).resolve().parents[2]


def test_the_loop_learns_and_its_zero_share_goes_to_the_target():
    command = [sys.executable, "examples/own_loop.py", "--steps", "81"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    told = [
        tuple(map(float, found)) for found in re.findall(r"loss ([\d.]+), zero share ([\d.]+)", done.stdout)
    ]
    assert len(told) == 5 and told[-1][0] < 0.8 * told[0][0]
    assert all(0.4 <= share <= 0.6 for _, share in told[1:])


def test_every_public_name_is_there_and_no_other():
    assert all(getattr(zm, name) is not None for name in zm.__all__)
    assert {"hf_to_megatron", "megatron_to_hf", "verify"} <= set(dir(zm.convert))
    with pytest.raises(AttributeError, match="nothing"):
        zm.nothing  # noqa: B018


def test_a_checkpoint_is_converted_loaded_and_given_back(world, one_process, tmp_path):
    zm.convert.hf_to_megatron(world.hf, tmp_path / "m", num_zero_experts=3)
    model = zm.load(tmp_path / "m")
    rows = model.arch.megatron["num_moe_experts"] + 3
    assert rows in {len(p) for name, p in model.chunk.named_parameters() if name.endswith("router.weight")}
    zm.convert.megatron_to_hf(tmp_path / "m", world.hf, tmp_path / "hf")
    assert zm.convert.verify(tmp_path / "hf", tmp_path / "m") == []
