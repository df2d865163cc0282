"""kill -9 at random moments, again and again, with checkpoints written in the foreground and in the background.

`pytest -m slow tests/test_soak.py -s`; ZEDA_SOAK_KILLS says how many kills (50).
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_world
import torch

from zeda_megatron.checkpoint.folders import iteration_of
from zeda_megatron.checkpoint.integrity import find_damage, has_integrity, intact_checkpoint

ROOT = Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get("ZEDA_SOAK_KILLS", 50))
STEPS = 6 * KILLS


def start(world, save, *flags):
    """The run as a process with a group of its own."""
    command = [sys.executable, "-m", "zeda_megatron", "train", "--no-progress"]
    fields = {
        "pretrained-checkpoint": world.dynamic,
        "data-path": world.rollouts,
        "save": save,
        "seq-length": 128,
        "global-batch-size": 4,
        "train-iters": STEPS,
        "lr": 1e-2,
        "loss-chunk-tokens": 32,
        "save-interval": 1,
        "most-recent-k": 3,
    }
    command += [str(part) for name, value in fields.items() for part in (f"--{name}", value)] + list(flags)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(save / "terminal.txt", "a") as file:  # a pipe would stay open as long as any child lives
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)


def partials(folder):
    return {path.name for path in folder.glob(".iter_*.partial")}


def wait_for_the_moment(folder, process, draw, old) -> None:
    """Half of the kills: a short while after a save began. The others: any time after the first new step."""
    metrics, before = folder / "metrics.jsonl", steps_of(folder)
    in_a_save, seen, nth = draw.random() < 0.5, set(), draw.randint(1, 3)
    while process.poll() is None:
        seen |= partials(folder) - old
        if in_a_save and len(seen) == nth:
            time.sleep(draw.random() * 0.3)
            return
        if not in_a_save and metrics.is_file() and steps_of(folder) != before:
            time.sleep(draw.random() * 2)
            return
        time.sleep(0.002)


def steps_of(folder) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.is_file() else 0


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_run_killed_at_random_moments_loses_no_checkpoint_and_ends_bit_equal(
    world, tmp_path, one_process, capsys
):
    straight = tiny_world.start(world, save=tmp_path / "straight", train_iters=STEPS)
    straight.run()
    draw, folder, saved = random.Random(1), tmp_path / "killed", 0
    folder.mkdir()
    count = {"kills": 0, "in a sync save": 0, "in an async save": 0, "of the whole group": 0}
    while count["kills"] < KILLS:
        background, group = count["kills"] % 2 == 1, draw.random() < 0.5
        old = partials(folder)
        process = start(world, folder, "--async-save" if background else "--no-async-save")
        wait_for_the_moment(folder, process, draw, old)
        hit = bool(partials(folder) - old)
        (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL, (folder / "terminal.txt").read_text()[-3000:]
        count["kills"] += 1
        count["of the whole group"] += group
        count["in an async save" if background else "in a sync save"] += hit
        warnings = []
        found = intact_checkpoint(folder, "--save", "hash", warnings.append)
        now = iteration_of(found) if found else 0
        assert now >= saved and warnings == []
        assert all(has_integrity(path) and not find_damage(path) for path in folder.glob("iter_*"))
        saved = now
    assert start(world, folder).wait(1800) == 0, (folder / "terminal.txt").read_text()[-3000:]
    with capsys.disabled():
        print(f"\n{count}, step {saved} of {STEPS} reached by then, nothing lost")
    assert not partials(folder) and "rror" not in (folder / "terminal.txt").read_text()
    end = tiny_world.snapshot(tiny_world.start(world, save=folder, train_iters=STEPS))
    for name, tensor in tiny_world.snapshot(straight).items():
        assert torch.equal(end[name], tensor), name
    assert tiny_world.read_metrics(folder) == tiny_world.read_metrics(tmp_path / "straight")
