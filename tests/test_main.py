"""The entry point as a process: what the terminal shows, exit codes, signals."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_world

from zeda_megatron.__main__ import main as zeda
from zeda_megatron.checkpoint.state import find_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def start(*flags: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONWARNINGS", None)
    command = [sys.executable, "-m", "zeda_megatron", "train", *map(str, flags)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def flags_of(world, save, **values) -> list[str]:
    fields = {"seq_length": 128, "global_batch_size": 4, "lr": 1e-2, "loss_chunk_tokens": 32} | values
    flags = ["--pretrained-checkpoint", world.dynamic, "--data-path", world.rollouts, "--save", save]
    return flags + [
        part for name, value in fields.items() for part in ("--" + name.replace("_", "-"), str(value))
    ]


def wait_for_steps(folder: Path, count: int, process: subprocess.Popen) -> None:
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") >= count):
        time.sleep(0.05)


def test_a_log_is_told_how_a_run_ended_alone_and_sigterm_ends_it_with_0(world, tmp_path):
    process = start(*flags_of(world, tmp_path, train_iters=5000, save_interval=2))
    wait_for_steps(tmp_path, 3, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    step = len(tiny_world.read_metrics(tmp_path))
    assert find_checkpoint(tmp_path).name == f"iter_{step:07d}" and 3 <= step < 5000
    lines = [line for line in re.split(r"[\r\n]+", err) if line.strip()]
    rest = [line for line in lines if "/5000" not in line]  # a bar: on a slow machine alone
    assert rest == [f"stopped at step {step} on request; saved step {step}"]
    assert out == ""


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        pytest.param(
            ["--num-zero-expert", "3"],
            "error: unknown argument --num-zero-expert; did you mean --num-zero-experts?",
            marks=pytest.mark.slow,  # tests/launch has another one, through the script
        ),
        (
            ["--data-path", "/nowhere.jsonl", "--pretrained-checkpoint", "DYNAMIC"],
            "error: /nowhere.jsonl: no such file",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(world, flags, words):
    process = start(*[str(world.dynamic) if flag == "DYNAMIC" else flag for flag in flags])
    out, err = process.communicate(timeout=200)
    assert process.returncode == 2 and out == ""
    assert err.startswith(words) and err.count("\n") == 1


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for two checkpoints or so."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("how", ["--no-async-save", pytest.param("--async-save", marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_still_loads(world, small_disk, one_process, how):
    process = start(*flags_of(world, small_disk, train_iters=50, save_interval=1), "--no-progress", how)
    out, err = process.communicate(timeout=250)
    assert process.returncode == 2 and out == ""
    assert re.fullmatch(rf"error: --save {small_disk}: cannot be written \(.*unharmed\n", err), err
    names = [path.name for path in small_disk.iterdir()]
    assert not any("partial" in name for name in names)
    last = max(name for name in names if name.startswith("iter_"))
    resumed = tiny_world.start(world, load=small_disk, train_iters=50)
    assert f"iter_{resumed.iteration:07d}" == last


def test_zeda_train_leaves_what_slurm_has_started_to_the_launcher(monkeypatch):
    monkeypatch.setattr("os.execvp", lambda file, words: started.append(words))
    started = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("PYTHON", "python")
    monkeypatch.setenv("SLURM_PROCID", "0")  # a batch script has it too
    zeda(["train", "--data-path", "a.jsonl"])
    assert started == [["bash", str(ROOT / "launch" / "pretrain_zeda.sh"), "--data-path", "a.jsonl"]]
