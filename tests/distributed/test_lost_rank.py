"""One of two processes dies or hangs: the run ends by itself, in time, with a message and an exit code."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny_world

from zeda_megatron.checkpoint.state import find_checkpoint

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(600)


class Job:
    """Two processes under the launch script, saving after every step."""

    def __init__(self, world, save: Path, *flags: str):
        self.save = save
        fields = {
            "pretrained-checkpoint": world.dynamic,
            "data-path": world.rollouts,
            "save": save,
            "seq-length": 128,
            "global-batch-size": 4,
            "loss-chunk-tokens": 32,
            "train-iters": 100000,
            "save-interval": 2,
            "most-recent-k": 2,
            "expert-model-parallel-size": 2,
        }
        command = ["bash", str(ROOT / "launch" / "pretrain_zeda.sh"), "--no-progress", *flags]
        command += [str(part) for name, value in fields.items() for part in (f"--{name}", value)]
        environment = os.environ | {"NPROC_PER_NODE": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
        self.terminal = save.with_suffix(".txt")
        with open(self.terminal, "w") as file:  # a pipe would stay open as long as any child lives
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)

    def wait_for_steps(self, count: int) -> None:
        metrics = self.save / "metrics.jsonl"
        while self.process.poll() is None:
            if metrics.is_file() and metrics.read_text().count("\n") >= count:
                return
            time.sleep(0.1)
        pytest.fail(self.terminal.read_text())

    def worker(self, rank: int) -> psutil.Process:
        """The process of a rank."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if child.environ().get("RANK") == str(rank) and child.ppid() == self.process.pid:
                return child
        raise AssertionError("no such worker")

    def end(self, timeout: float) -> str:
        """What stands on the terminal when the job has ended by itself."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
            self.process.kill()
            raise
        return self.terminal.read_text()


def last_saved(world, folder: Path) -> int:
    """Step of the newest checkpoint, after loading it."""
    run = tiny_world.start(world, load=folder)
    assert f"iter_{run.iteration:07d}" == find_checkpoint(folder).name
    return run.iteration


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_ends_the_run_with_a_message(world, tmp_path, one_process, rank):
    job = Job(world, tmp_path / "run", "--distributed-timeout-minutes", "2")
    job.wait_for_steps(3)
    job.worker(rank).send_signal(signal.SIGKILL)
    told = job.end(timeout=120)
    assert job.process.returncode == 128 + signal.SIGKILL, told
    assert "Traceback" not in told and "SIGKILL" in told
    assert last_saved(world, job.save) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_ends_the_run_within_the_timeout_with_one_line(world, tmp_path, one_process, rank):
    job = Job(world, tmp_path / "run", "--distributed-timeout-minutes", "0.5")
    job.wait_for_steps(3)
    job.worker(rank).send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    told = job.end(timeout=180)
    assert job.process.returncode == 3, told
    who = "" if rank else "rank 1: "
    expected = (
        rf"error: {who}\w+ in [\w/]+\.py \(\w+\): another process did not answer within "
        r"--distributed-timeout-minutes 0\.5: .*py-spy.*start the same command again.*\n"
    )
    assert re.fullmatch(expected, told), told
    # The limit, torchrun's 30 seconds before it kills the one that hangs, and some for a slow machine.
    assert time.monotonic() - begun < 30 + 30 + 60
    assert last_saved(world, job.save) >= 2
    assert [json.loads(line)["step"] for line in (job.save / "metrics.jsonl").read_text().splitlines()][
        :3
    ] == [1, 2, 3]
