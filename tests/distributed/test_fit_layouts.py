"""Heads fitted by two processes equal those of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from zeda_megatron.models.load import load_model
from zeda_megatron.moe.paired import paired_modules

pytestmark = pytest.mark.timeout(600)
TOOL = Path(__file__).parents[2] / "tools" / "fit_zero_rows.py"


def fit(world, out: Path, processes: int, *flags: str):
    """(report, heads) of a fit under torchrun. Five rows: two processes share them unevenly."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nnodes", "1"]
    command += ["--nproc-per-node", str(processes), "--master-addr", "127.0.0.1", "--master-port", str(port)]
    command += [str(TOOL), "--pretrained-checkpoint", str(world.static), "--data-path", str(world.rollouts)]
    command += ["--save", str(out), "--fit-rows", "5", "--held-out-rows", "1", "--seq-length", "128", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    terminal = out.with_suffix(".txt")
    with open(terminal, "w") as file:
        done = subprocess.run(command, env=environment, stdout=file, stderr=file, timeout=500)
    assert done.returncode == 0, terminal.read_text()[-4000:]
    made = paired_modules(load_model(str(out)).chunk)
    return json.loads((out / "fit.json").read_text()), [(p.weight.detach(), p.bias.detach()) for p in made]


@pytest.fixture(scope="module")
def alone(one_process, world, tmp_path_factory):
    return fit(world, tmp_path_factory.mktemp("alone") / "out", 1)


@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        pytest.param(2, [], id="dp2", marks=pytest.mark.slow),  # ep2 shares the rows out like this, too
        pytest.param(2, ["--expert-model-parallel-size", "2"], id="ep2"),
        pytest.param(2, ["--tensor-model-parallel-size", "2"], id="tp2", marks=pytest.mark.slow),
        pytest.param(
            4,
            ["--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2"],
            id="tp2 dp2 ep2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_same_heads_threshold_and_quality_everywhere(world, alone, tmp_path, processes, flags):
    report, heads = fit(world, tmp_path / "out", processes, *flags)
    for mine, wanted in zip(heads, alone[1], strict=True):
        tiny.close(mine[0], wanted[0], atol=1e-5, rtol=1e-3)
        tiny.close(mine[1], wanted[1], atol=1e-4, rtol=1e-4)
    wanted = alone[0]
    assert report["zero_experts_type"] == "low_rank"  # as no flag says otherwise
    for name in ("rows", "held_out_rows", "experts_without_rows", "experts_with_few_rows"):
        assert report[name] == wanted[name], name
    assert report["threshold"] == pytest.approx(wanted["threshold"], abs=1e-3)
    assert report["zero_share"] == pytest.approx(0.5, abs=0.005)
    for name in ("r2_by_layer", "r2_of_constants_by_layer", "stand_in_explains_by_layer"):
        assert list(report[name].values()) == pytest.approx(list(wanted[name].values()), abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--expert-model-parallel-size", "--tensor-model-parallel-size"])
def test_hidden_units_are_as_good_everywhere(world, tmp_path, flag):
    """Ranks draw other rows for the descent, so heads are near, not equal; what they skip decides the stand-ins."""
    report, _ = fit(world, tmp_path / "out", 2, flag, "2", "--paired-head", "mlp")
    wanted, _ = fit(world, tmp_path / "alone", 1, "--paired-head", "mlp")
    assert report["zero_share"] == pytest.approx(0.5, abs=0.01)
    assert report["threshold"] == pytest.approx(wanted["threshold"], abs=0.1)
    for name in ("r2_by_layer", "stand_in_explains_by_layer"):
        assert list(report[name].values()) == pytest.approx(list(wanted[name].values()), abs=0.05), name
