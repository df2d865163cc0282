"""Bytes between expert-parallel ranks fall with the zero share: the tool's own run of two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.measure.dispatch_bytes import GEOMETRY

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
TOKENS = 2 * 128
"""Of both processes."""


def run(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.measure.dispatch_bytes", *flags]
    environment = {k: v for k, v in os.environ.items() if k != "RANK"} | {"GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280, env=environment)


def measured(tmp_path, *flags: str) -> tuple[list[dict], str]:
    file = tmp_path / "bytes.json"
    done = run("--seq-length", "128", "--micro-batches", "1", "--json", str(file), *flags)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())["rows"], done.stdout


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    return measured(tmp_path_factory.mktemp("paired"))


def test_half_zero_slots_halve_the_bytes_and_three_quarters_leave_a_quarter(paired):
    static, half, quarter, _ = paired[0]
    assert static["zero_share"] == 0
    assert half["zero_share"] == pytest.approx(0.5, abs=0.01)
    assert half["bytes_ratio"] <= 0.52 and half["sent_ratio"] <= 0.55
    assert quarter["bytes_ratio"] <= 0.27


def test_rows_dispatched_are_the_real_slots_exactly(paired):
    for row in paired[0][:3]:
        assert row["rows_there_and_back"] == 2 * row["real_slots"]
        assert row["rows_forward"] == row["rows_backward"] == 8 * row["real_slots"] * GEOMETRY["hidden_size"]


def test_the_static_model_sends_what_the_formula_says(paired):
    """T*K rows of H numbers to the experts and back, forward and backward; their weights once each way."""
    static, *_, trains = paired[0]
    slots = TOKENS * GEOMETRY["num_experts_per_tok"] * GEOMETRY["num_hidden_layers"]
    counts = 2 * GEOMETRY["num_hidden_layers"] * GEOMETRY["num_experts"] * 8
    assert static["slots"] == slots
    assert static["bytes"] == slots * (4 * GEOMETRY["hidden_size"] + 2) * 4 + counts
    # A head that trains dispatches every pick, whatever it skips: the figure can stay up.
    assert trains["zero_share"] == pytest.approx(0.5, abs=0.02) and trains["bytes"] == static["bytes"]


def test_the_teacher_sends_the_same_at_every_share(paired):
    rows, printed = paired
    assert len({row["teacher_bytes"] for row in rows}) == 1 and rows[0]["teacher_bytes"] > 0
    assert len([line for line in printed.splitlines() if line.startswith("|")]) == len(rows) + 2


def test_a_pick_rule_that_keeps_half_the_picks_sends_exactly_half(tmp_path):
    (static, half), _ = measured(tmp_path, "--routing", "topk", "--zero-shares", "0", "0.5")
    assert half["zero_share"] == 0.5 and 2 * half["rows_forward"] == static["rows_forward"]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--routing", "x"], "error: --routing 'x' is unknown; choose one of paired, topk"),
        (["--zero-shares", "0", "1.5"], "error: --zero-shares 0 1.5: give numbers from 0 to below 1"),
        (["--hf-config", "/nowhere"], "error: --hf-config /nowhere: no such folder"),
        (
            ["--expert-model-parallel-size", "1"],
            "error: --expert-model-parallel-size must be at least 2: one process sends nothing",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(flags, line):
    done = run(*flags)
    assert done.returncode == 2 and done.stderr.splitlines() == [line]
