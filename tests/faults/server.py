"""Runs commands in forks of itself, so that each costs what it does and not what importing torch costs.

Started by `machine.Machine` with the preload library. One JSON line in for each request, one out: {"plan", "folder",
"argv", "module", "ranks", "output"} becomes {"pids"}; then {"wait": pid} becomes {"status"} once the process has ended.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import runpy
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = (
    "convert.command",
    "checkpoint.saving",
    "evaluation.answering.run",
    "serving.transformers.zero_expert_model",
    "fit.run",
    "training.main",
)


def run(request: dict, rank: int, port: int) -> None:
    """Become the command; never returns."""
    os.setsid()
    os.chdir(request["folder"])
    out = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in enumerate("rww"))
    if request["ranks"] > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["ranks"], "MASTER_PORT": port}
        os.environ.update({"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in place.items()})
    os.environ["ZEDA_FAULTS"] = request["plan"]  # for the processes that it starts
    ctypes.CDLL(None).faults_arm(request["plan"].encode())
    code = 1
    try:
        sys.argv = request["argv"]
        if request["module"]:
            sys.path.insert(0, str(ROOT))
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        # As the interpreter would end, but without the server's own state: wait for threads, then for children.
        import threading
        from multiprocessing.util import _exit_function

        threading._shutdown()
        _exit_function()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve() -> None:
    sys.path.insert(0, str(ROOT))
    from zeda_megatron.runtime import cpu

    cpu.quiet()
    cpu.install()
    for part in PARTS:
        importlib.import_module(f"zeda_megatron.{part}")
    answers = os.fdopen(os.dup(1), "w")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = {"status": os.waitpid(request["wait"], 0)[1]}
        else:
            port, pids = free_port(), []
            for rank in range(request["ranks"]):
                pid = os.fork()
                if pid == 0:
                    run(request, rank, port)
                pids.append(pid)
            answer = {"pids": pids}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
