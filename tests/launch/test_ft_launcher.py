"""NVIDIA's ft_launcher starts a crashed run again inside the job."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny_world

pytest.importorskip("nvidia_resiliency_ext", reason="pip install nvidia-resiliency-ext nvidia-ml-py")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]


def command(world, save: Path) -> list[str]:
    launcher = [
        "--nproc-per-node=2",
        "--max-restarts=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
    ]
    fields = {
        "pretrained-checkpoint": world.dynamic,
        "data-path": world.rollouts,
        "save": save,
        "seq-length": 128,
        "global-batch-size": 4,
        "loss-chunk-tokens": 32,
        "train-iters": 24,
        "save-interval": 4,
    }
    return [
        *(sys.executable, "-m", "nvidia_resiliency_ext.fault_tolerance.launcher", *launcher),
        *("--ft-cfg-path", str(ROOT / "launch" / "nvrx.yaml")),
        *(str(ROOT / "launch" / "pretrain_zeda.sh"), "--no-progress"),
        *(str(part) for name, value in fields.items() for part in (f"--{name}", value)),
    ]


def started(world, save: Path) -> subprocess.Popen:
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    with open(save.with_suffix(".txt"), "w") as terminal:
        return subprocess.Popen(command(world, save), env=environment, stdout=terminal, stderr=terminal)


def test_a_run_whose_process_was_killed_goes_on_and_ends_as_if_nothing_had_happened(world, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert started(world, whole).wait() == 0, whole.with_suffix(".txt").read_text()
    run, tracker = started(world, killed), killed / "latest_checkpointed_iteration.txt"
    while not tracker.is_file():
        assert run.poll() is None, killed.with_suffix(".txt").read_text()
        time.sleep(0.1)
    workers = psutil.Process(run.pid).children(recursive=True)
    next(worker for worker in workers if worker.environ().get("RANK") == "1").kill()
    assert run.wait() == 0, killed.with_suffix(".txt").read_text()
    assert "will restart worker group" in killed.with_suffix(".txt").read_text()
    assert tiny_world.read_metrics(killed) == tiny_world.read_metrics(whole)
