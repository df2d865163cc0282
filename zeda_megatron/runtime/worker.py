"""Entry of a process that may be one of many: a user's mistake is told once, and torchrun's report repeats it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from ..errors import UserError
from .lost_peer import lost_peer

_MAIN_PID = "ZEDA_MAIN_PID"
LOST_LAUNCHER = 3
"""As for a process that another one did not answer: to be started again."""
PATIENCE_SECONDS = 20.0
"""How long ranks above 0 wait before they speak: nearly always rank 0 met the same mistake and ends the run."""


def run_worker(main: Callable[[], int | None], patience: float = PATIENCE_SECONDS) -> None:
    """Run `main` and exit with its code; 2 and one line on stderr for a `UserError`, 3 if another process is lost.

    Rank 0 prints at once. The others, if nobody has ended them after `patience` seconds, print their own line
    with their rank: the mistake is on their host only, such as a missing file. `--debug` on the command line (or
    ZEDA_DEBUG=1) lets the traceback through. Ctrl-C ends with 130, as shells expect.
    """
    rank = int(os.environ.get("RANK", 0))
    os.environ[_MAIN_PID] = str(os.getpid())
    if os.environ.get("TORCHELASTIC_RUN_ID"):
        _end_without_launcher()
    try:
        code = main()
    except (UserError, RuntimeError) as error:
        told = error if isinstance(error, UserError) else lost_peer(error)
        if told is None or "--debug" in sys.argv or os.environ.get("ZEDA_DEBUG") == "1":
            raise
        if rank:
            time.sleep(min(patience, getattr(told, "patience", patience)))
        _tell_torchrun(f"error: {told}")
        print(f"error: rank {rank}: {told}" if rank else f"error: {told}", file=sys.stderr, flush=True)
        _leave(told.exit_code)
    except KeyboardInterrupt:
        if not rank:
            print("interrupted: what was not saved is lost", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    _leave(code or 0)


def _end_without_launcher(seconds: float = 2.0) -> None:
    """End this process soon after torchrun, should that be killed: nobody else would, and it would keep its GPU."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(seconds)
        print("error: the launcher of this process is gone", file=sys.stderr, flush=True)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(LOST_LAUNCHER)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def _leave(code: int) -> None:
    """Exit; with several processes without the interpreter's clean-up, where gloo's threads now and then abort a
    run that has done all its work."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        for child in multiprocessing.active_children():  # Megatron's writers of checkpoints would stay behind
            child.kill()  # SIGTERM says nothing to them: it asks for a save
            child.join(5)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def leave_with_parent(seconds: float = 1.0) -> None:
    """End this process soon after its parent, and not before. For the children that Megatron starts to write
    checkpoints: after a kill -9 they would wait for ever, with the run's terminal or pipe still open. Slurm signals all
    processes of a task; without these children the save that the signal asks for would fail."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    # The parent may be gone already; but in a container it may be process 1 itself.
    orphan = parent == 1 and os.environ.get(_MAIN_PID, "1") != "1"

    def watch() -> None:
        while os.getppid() == parent and not orphan:
            time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=watch, name="leave-with-parent", daemon=True).start()


def _tell_torchrun(message: str) -> None:
    """Leave the line where torchrun looks for a worker's error: its report then ends with it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        about = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with open(file, "w", encoding="utf-8") as handle:
            json.dump({"message": about}, handle)
