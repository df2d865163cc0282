"""One voice for a user's mistake, however many processes meet it."""

import json
import os
import subprocess
import sys

import pytest

from zeda_megatron.errors import UserError
from zeda_megatron.runtime.worker import run_worker


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
