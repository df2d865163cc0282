"""The memory table of the distillation loss, through its command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.measure.loss_memory", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)


def test_the_fused_loss_peaks_below_full_logits_at_the_same_value():
    done = run("--tokens", "512", "--vocab", "8192", "--hidden", "16", "--chunk-tokens", "64", "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    logits = 4 * 512 * 8192
    assert row["fused"]["peak"] < 1.5 * logits < 4 * logits < row["full"]["peak"]
    assert abs(row["fused"]["loss"] - row["full"]["loss"]) < 1e-5 * row["full"]["loss"]


def test_sizes_below_one_are_one_line_and_exit_code_2():
    done = run("--tokens", "0")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: --tokens must be at least 1, got [0]"]
