"""One voice for a user's mistake, however many processes meet it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from zeda_megatron.errors import UserError
from zeda_megatron.runtime.worker import lost_peer, run_worker


def wrong() -> int:
    raise UserError("--lr fast: not a number")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.setattr("sys.argv", ["run"])
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE", "ZEDA_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_the_exit_code_is_that_of_main(returned, code):
    with pytest.raises(SystemExit) as end:
        run_worker(lambda: returned)
    assert end.value.code == code


def test_one_of_several_processes_leaves_with_the_code_of_main_and_all_it_printed(tmp_path):
    script = "from zeda_megatron.runtime.worker import run_worker; run_worker(lambda: print('done') or 3)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env={**os.environ, "WORLD_SIZE": "2"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "done\n")


def test_no_child_process_stays_behind(tmp_path):
    """It would hold the pipe open, and whoever reads the output would wait for ever."""
    script = tmp_path / "run.py"
    script.write_text(
        "import multiprocessing, time\n"
        "from zeda_megatron.runtime.worker import run_worker\n"
        "def main():\n"
        "    multiprocessing.get_context('spawn').Process(target=time.sleep, args=(600,), daemon=True).start()\n"
        "if __name__ == '__main__':\n"
        "    run_worker(main)\n"
    )
    environment = {**os.environ, "WORLD_SIZE": "2", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_children_end_after_a_parent_that_was_killed(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import multiprocessing, os, time\n"
        "from zeda_megatron.runtime.worker import leave_with_parent\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.get_context('spawn').Process(target=time.sleep, args=(600,)).start()\n"
        "    time.sleep(3)\n"
        "    os.kill(os.getpid(), 9)\n"
        "else:\n"
        "    leave_with_parent(0.1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    # The pipes stay open as long as a child lives.
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, timeout=60)
    assert done.returncode == -9


def test_rank_0_speaks_at_once(capsys):
    with pytest.raises(SystemExit) as end:
        run_worker(wrong, patience=1e9)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: --lr fast: not a number\n"


def test_other_ranks_let_rank_0_speak_first_and_then_say_who_they_are(monkeypatch, capsys):
    slept = []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr("time.sleep", slept.append)
    with pytest.raises(SystemExit) as end:
        run_worker(wrong, patience=4.5)
    assert end.value.code == 2 and slept == [4.5]
    assert capsys.readouterr().err == "error: rank 3: --lr fast: not a number\n"


def test_torchruns_own_reader_finds_the_message(monkeypatch, tmp_path):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises(SystemExit):
        run_worker(wrong)
    assert json.loads(file.read_text())
    report = str(ChildFailedError("run", {0: ProcessFailure(0, 1, 2, str(file))}))
    assert "traceback : error: --lr fast: not a number" in report


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr("sys.argv", ["run", "--debug"])
    with pytest.raises(UserError):
        run_worker(wrong)


def test_ctrl_c_leaves_no_traceback(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_worker(interrupted)
    assert end.value.code == 130
    assert capsys.readouterr().err.startswith("interrupted")


def test_a_killed_run_takes_its_writers_and_their_writers_with_it(tmp_path):
    script = (
        "import os, time\n"
        "from multiprocessing import get_context\n"
        "from zeda_megatron.runtime.worker import end_with_parent\n"
        "fork = get_context('fork').Process\n"
        "def below():\n"
        "    open('below', 'w').write(str(os.getpid())); time.sleep(600)\n"
        "def writer():\n"
        "    open('writer', 'w').write(str(os.getpid())); fork(target=below).start(); time.sleep(600)\n"
        "end_with_parent(); end_with_parent()\n"
        "fork(target=writer).start()\n"
        "while not (os.path.exists('below') and open('below').read()): time.sleep(0.02)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, timeout=100)
    assert done.returncode == -9
    numbers = [int((tmp_path / name).read_text()) for name in ("writer", "below")]
    end = time.monotonic() + 20
    while any(psutil.pid_exists(number) for number in numbers) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(number) for number in numbers)


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"
WAITED = f"{GLOO}unbound_buffer.cc:78] Timed out waiting 15000ms for recv operation to complete"
GONE = f"{GLOO}pair.cc:553] Connection closed by peer [127.0.0.1]:49833"


def test_a_timeout_names_the_limit_and_what_to_do():
    told = str(lost_peer(RuntimeError(WAITED)))
    assert "did not answer within --distributed-timeout-minutes 0.25" in told and "py-spy" in told
    assert "start the same command again" in told and "\n" not in told


def test_the_second_collective_after_a_timeout_is_told_as_one_too():
    assert "did not answer" in str(lost_peer(RuntimeError("Application timeout caused pair closure")))


def test_a_closed_connection_says_that_a_process_is_gone():
    told = str(lost_peer(RuntimeError(GONE)))
    assert "another process of this run is gone" in told and "start the same command again" in told


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape '[2, 3]' is invalid for input of size 5"),
        RuntimeError("the download timed out"),
        RuntimeError("gloo: unsupported data type"),
        ValueError(WAITED),
        torch.distributed.DistBackendError("NCCL error: unhandled cuda error, out of memory"),
    ],
)
def test_other_errors_stay_what_they_are(error, monkeypatch):
    assert lost_peer(error) is None

    def fail():
        raise error

    with pytest.raises(type(error), match=r"."):
        run_worker(fail)


def test_the_run_ends_with_a_code_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run"])
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE", "ZEDA_DEBUG"):
        monkeypatch.delenv(name, raising=False)

    def fail():
        raise RuntimeError(GONE)

    with pytest.raises(SystemExit) as end:
        run_worker(fail)
    assert end.value.code == 3
    assert capsys.readouterr().err.startswith("error: a collective: another process of this run is gone")


CHILD = """
import multiprocessing, signal, sys
from zeda_megatron.__main__ import door

def tell():
    print(signal.getsignal(signal.SIGTERM) is signal.SIG_IGN, flush=True)

if __name__ == "__main__":
    tell()
    child = multiprocessing.get_context("spawn").Process(target=tell)
    child.start()
    child.join()
"""


def test_only_the_children_of_a_program_leave_the_signals_to_it(tmp_path):
    (tmp_path / "program.py").write_text(CHILD)
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_a_child_of_python_m_zeda_megatron_leaves_the_signals_to_it_too(tmp_path):
    """multiprocessing gives children the file of a main module without a spec; that of a package it leaves out."""
    code = """
import runpy, sys, zeda_megatron.runtime.worker as worker
from multiprocessing import get_context
import multiprocessing.spawn as spawn
worker.run_worker = lambda main: print(spawn.get_preparation_data("child").get("init_main_from_path"))
sys.argv = ["zeda"]
runpy.run_module("zeda_megatron", run_name="__main__", alter_sys=True)
"""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == str(root / "zeda_megatron" / "__main__.py"), done.stderr
