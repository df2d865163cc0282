"""The kernels' first minutes on a GPU: what each step decides, whatever its commands do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.gpu import first

ROOT = Path(__file__).parents[2]


def row(backend, what="layer", tokens=4096, share=0.0, device=100.0, host=10.0, tflops=1.0):
    keys = ("model", "backend", "what", "tokens", "zero_share", "device_us", "host_us", "tflops")
    return dict(zip(keys, ("m", backend, what, tokens, share, device, host, tflops)))


def test_figures_are_judged_against_torch_s_and_against_the_host():
    rows = [
        row("kernels"),
        row("grouped_mm", device=90.0),
        row("kernels", share=0.5, device=68.0, tflops=612.0),
        row("kernels", tokens=8, device=50.0, host=80.0),
        row("kernels", what="forward", device=20.0),
        row("grouped_mm", what="forward", device=30.0, tflops=900.0),
    ]
    assert first.slower(rows) == ["layer m 4096 0.0: 1.11 times grouped_mm's time"]
    assert first.host_bound(rows) == ["m 8 0.0: 80 us for 50"]
    assert first.judgement(rows) == (
        "m: t(.5)/t(0) = 0.68 at 4096; at best 612 TFLOP/s; 1 cases slower than torch's; Python is the limit in 1 cases"
    )


def steps(folder):
    return {step["name"]: step for step in json.loads((folder / "first.json").read_text())}


def test_all_steps_are_walked_through_without_a_gpu(tmp_path):
    line = ["bash", str(ROOT / "tools" / "gpu_validate.sh"), "--first", "--out", str(tmp_path)]
    here = os.environ | {"ZEDA_VALIDATE_DEVICE": "cpu", "PYTHON": sys.executable}
    done = subprocess.run(line, capture_output=True, text=True, env=here)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = tmp_path.iterdir()
    found = steps(folder)
    assert list(found) == ["machine", "smoke", "tests", "tiles", "times", "profile"]
    assert found["smoke"]["decision"] == "every kernel gives the right numbers: go on"
    assert found["tests"]["decision"] == "1 tests pass: go on"
    assert "TFLOP/s" in found["times"]["decision"] and (folder / "bench.json").is_file()


def test_a_broken_kernel_keeps_the_clock_off_and_the_others_are_told(tmp_path, monkeypatch):
    run = first.First(ROOT, tmp_path, "cpu")

    def command(limit, *parts):
        if "smoke.py" in parts[0]:
            (tmp_path / "smoke.json").write_text(
                '{"forward small": "ok", "dgrad large": "hangs: no answer in 40 s"}'
            )
            return 1, ""
        return 0, "3 passed"

    monkeypatch.setattr(run, "_command", command)
    assert run.run() == 1
    found = steps(tmp_path)
    assert found["smoke"]["decision"].startswith("dgrad large: not right")
    assert found["tiles"]["decision"] == found["times"]["decision"] == "left out: dgrad large"


@pytest.mark.parametrize(
    ("told", "decision"),
    [
        ("FAILED a\n" * 7 + "7 failed, 2 passed", "7 results: nothing is timed"),
        ("FAILED a\n1 failed, 2 passed", "1 tests fail: go on"),
        ("a crash", "no results: nothing is timed"),
    ],
)
def test_failed_tests_decide_whether_anything_is_timed(tmp_path, monkeypatch, told, decision):
    run = first.First(ROOT, tmp_path, "cpu")
    monkeypatch.setattr(run, "_command", lambda limit, *parts: (1, told))
    said, found = run.tests()
    assert said.startswith(decision) and found["failed"]
    assert bool(run.broken) == ("nothing" in decision)


def test_a_command_that_hangs_is_stopped_and_one_whose_time_is_up_never_begins(tmp_path, monkeypatch):
    run = first.First(ROOT, tmp_path, "cpu")
    monkeypatch.setattr(first, "SECONDS", 5.0)
    code, told = run._command(1.0, "-c", "import time; print('begun', flush=True); time.sleep(60)")
    assert code == 124 and "begun" in told and "stopped after 10 s" in told
    assert run.run() == 0
    assert {step["decision"] for step in steps(tmp_path).values()} == {"left out: the time is up"}
