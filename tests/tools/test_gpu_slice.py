"""The checks of real layers that wait for a GPU work, at tiny sizes on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.gpu import validate as gpu_validate
from tools.gpu.slice import SLICES, write_slice
from zeda_megatron.models.architecture import read_architecture

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("recipe", SLICES)
def test_a_slice_has_one_moe_layer_of_the_recipes_model(recipe, tmp_path):
    run = gpu_validate.Validation(ROOT, tmp_path, "cpu")
    arch = read_architecture(write_slice(run, recipe))
    whole = read_architecture(ROOT / "examples" / recipe)
    assert sum(arch.megatron["moe_layer_freq"]) == 1
    for name in (
        "num_moe_experts",
        "moe_router_topk",
        "moe_router_score_function",
        "moe_router_topk_scaling_factor",
    ):
        assert arch.megatron.get(name) == whole.megatron.get(name), name


def test_an_unknown_check_is_refused_before_anything_runs(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_validate", "--root", str(ROOT), "--only", "glm,nonsense"])
    assert gpu_validate.main() == 2
    assert capsys.readouterr().err == "error: --only nonsense: no such check\n"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_walk_without_a_gpu_runs_every_check_that_a_cpu_can(tmp_path):
    command = ["bash", str(ROOT / "tools" / "gpu_validate.sh"), "--out", str(tmp_path)]
    environment = os.environ | {"ZEDA_VALIDATE_DEVICE": "cpu", "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (report,) = tmp_path.glob("*_cpu.json")
    checks = {check["name"]: check for check in json.loads(report.read_text())["checks"]}
    assert {name for name, check in checks.items() if "skipped" in check} == {
        "permute_fusion",
        "flex",
        "own_kernels",
    }
    assert list(checks) == list(gpu_validate.checks(gpu_validate.Validation(ROOT, tmp_path, "cpu")))
