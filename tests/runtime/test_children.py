"""Children that were forked do not outlive the process that forked them."""

import os
import subprocess
import sys
import time

import psutil


def test_a_killed_run_takes_its_writers_and_their_writers_with_it(tmp_path):
    script = (
        "import os, time\n"
        "from multiprocessing import get_context\n"
        "from zeda_megatron.runtime.children import end_with_parent\n"
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
