"""torchrun with manners, around workers of three lines."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def elastic(tmp_path):
    """Starts two workers that run `text` (which knows `rank`); returns the process, its output in `err`."""

    def start(text: str) -> subprocess.Popen:
        worker = tmp_path / "worker.py"
        worker.write_text(f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{text}\n")
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "zeda_megatron.runtime.elastic", "--standalone"),
                "--nproc-per-node=2",
                worker,
            ],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def until(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def test_the_exit_code_is_the_workers_and_the_report_has_no_traceback(elastic):
    run = elastic("sys.exit(7 if rank else time.sleep(600))")
    errors = run.communicate(timeout=120)[1]
    assert run.returncode == 7
    assert "exitcode  : 7" in errors and "Traceback" not in errors


def test_a_user_error_stays_one_line(elastic):
    run = elastic(
        "rank and time.sleep(600); sys.stderr.write('error: this\\n'); sys.stderr.flush(); sys.exit(2)"
    )
    assert run.communicate(timeout=120)[1] == "error: this\n"
    assert run.returncode == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_request_to_stop_reaches_every_worker_once_and_a_clean_end_counts_as_success(
    elastic, tmp_path, number
):
    run = elastic(
        "got = []\n"
        f"signal.signal({int(number)}, lambda *_: got.append(1))\n"
        "open(f'ready{rank}', 'w').close()\n"
        "while not got: time.sleep(0.02)\n"
        "time.sleep(0.5)\n"  # saving takes its time; a second signal would show
        "open(f'saved{rank}', 'w').write(str(len(got)))"
    )
    until(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(2)))
    run.send_signal(number)
    assert run.communicate(timeout=120)[1] == ""
    assert run.returncode == 0
    assert [(tmp_path / f"saved{rank}").read_text() for rank in range(2)] == ["1", "1"]


def test_a_stop_before_training_began_is_told_so(elastic, tmp_path):
    run = elastic("open(f'ready{rank}', 'w').close(); time.sleep(600)")
    until(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(2)))
    run.send_signal(signal.SIGTERM)
    assert run.communicate(timeout=120)[1] == "stopped by SIGTERM before the first step: nothing to save\n"
    assert run.returncode == 143


def test_a_killed_worker_is_the_cause_and_those_that_miss_it_are_not(elastic, tmp_path):
    """Both are dead when torchrun looks: rank 0 ends with 3 as soon as rank 1 is gone."""
    text = f"""
pid = {str(tmp_path / "pid")!r}
if rank == 1:
    open(pid + ".new", "w").write(str(os.getpid()))
    os.rename(pid + ".new", pid)
    os.kill(os.getpid(), signal.SIGKILL)
import psutil
while not os.path.exists(pid):
    time.sleep(0.001)
while psutil.pid_exists(int(open(pid).read())) and psutil.Process(int(open(pid).read())).status() != "zombie":
    time.sleep(0.001)
os._exit(3)"""
    process = elastic(text)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGKILL, told
    assert "SIGKILL" in told and "Traceback" not in told
