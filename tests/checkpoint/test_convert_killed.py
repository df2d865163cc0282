"""Conversions that are killed at any point: run again, they end with the bits of one that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from corruptions import snapshot
from test_convert_memory import CONFIG

from zeda_megatron.checkpoint.random_model import write_random_model

CLI = Path(__file__).parents[2] / "tools" / "checkpoint_convert.py"
KILLS = 5


def command(direction, root, out):
    """Small files, so that kills meet many of them."""
    flags = ["--out", str(out), "--max-shard-bytes", "8000000", "--workers", "2"]
    if direction == "import":
        source = ["hf-to-megatron", "--hf", str(root / "hf"), "--num-zero-experts", "16"]
    else:
        source = ["megatron-to-hf", "--megatron", str(root / "m"), "--hf-template", str(root / "hf")]
    return [sys.executable, str(CLI), *source, *flags]


def finished(partial):
    return len(list((partial / "notes").glob("*.json"))) if partial.is_dir() else 0


def run_and_kill(arguments, partial, files):
    """Kill the command a moment after it has finished so many files; True if it was still at work."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while process.poll() is None and finished(partial) < files and time.monotonic() < until:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    error = process.stderr.read()
    code = process.wait()
    assert code in (0, -signal.SIGKILL), error
    return code != 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("direction", ["import", "export"])
def test_killed_conversion_goes_on_and_ends_with_the_same_bits(tmp_path, direction):
    write_random_model(tmp_path / "hf", CONFIG | {"num_hidden_layers": 2}, 20_000_000, torch.float32)
    if direction == "export":
        subprocess.run(command("import", tmp_path, tmp_path / "m"), check=True, stdout=subprocess.DEVNULL)
    subprocess.run(command(direction, tmp_path, tmp_path / "whole"), check=True, stdout=subprocess.DEVNULL)
    out, partial, draw = tmp_path / "out", tmp_path / "out.partial", random.Random(11)
    killed, seen = 0, []
    for _ in range(KILLS):
        goal = finished(partial) + draw.randrange(4)
        killed += run_and_kill(command(direction, tmp_path, out), partial, goal)
        seen.append(finished(partial))
        assert not out.exists() or not partial.exists() or not (partial / "work").exists()
        if out.exists():
            break
    assert (killed >= 2 and seen == sorted(seen)) or out.exists(), (killed, seen)
    if not out.exists():
        done = {
            path.name: path.stat().st_mtime_ns for path in (partial / "work").rglob("*.*") if path.is_file()
        }
        noted = {Path(json.loads(n.read_text())["name"]).name for n in (partial / "notes").glob("*.json")}
        subprocess.run(command(direction, tmp_path, out), check=True, stdout=subprocess.DEVNULL)
        after = {path.name: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.is_file()}
        assert noted and all(after[name] == done[name] for name in noted)  # not written a second time
    assert snapshot(out) == snapshot(tmp_path / "whole")
    assert not partial.exists() and [p for p in tmp_path.iterdir() if p.name.startswith("out.")] == []
