"""The teacher's cost is measured on real steps of every variant."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.measure.teacher_cost import BASE, VARIANTS, parse
from zeda_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_variant_is_measured_and_a_second_model_takes_memory(world, tmp_path):
    out = tmp_path / "cost.json"
    command = [
        sys.executable,
        "-m",
        "tools.measure.teacher_cost",
        "--hf",
        world.hf,
        "--rows",
        world.rollouts,
    ]
    command += ["--num-zero-experts", "4", "--seq-length", "128", "--global-batch-size", "2", "--steps", "3"]
    done = subprocess.run(
        [*map(str, command), "--json", str(out)], capture_output=True, text=True, timeout=280, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    rows = {row["variant"]: row for row in json.loads(out.read_text())}
    assert list(rows) == list(VARIANTS) and done.stdout.count("\n") == len(VARIANTS) + 2
    assert (
        rows["plain, static model"]["times_plain"] == rows["routers only, no teacher"]["times_plain"] == 1.0
    )
    assert all(row["seconds"] > 0 and row["peak_mib"] > 0 for row in rows.values())


def test_what_a_variant_is_compared_with_exists():
    assert set(BASE.values()) <= set(VARIANTS)


@pytest.mark.parametrize("flags", [["--steps", "1"], ["--seq-length", "0"]])
def test_flags_that_cannot_work_are_named(flags):
    with pytest.raises(UserError, match=flags[0]):
        parse(flags)
