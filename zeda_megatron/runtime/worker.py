"""Entry of a process that may be one of many: a user's mistake is told once, and torchrun's report repeats it.

So is a collective that cannot end because another process is gone or hangs: one line instead of gloo's. (NCCL does
not come here when a rank hangs: its watchdog ends the process with a report of its own.) And no child outlives its
parent: Megatron's writers of checkpoints, forked by a run that was killed, may wait for ever, with the run's terminal
or pipe still open.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError

_GLOO = re.compile(r"gloo|pair closure", re.IGNORECASE)
_GONE = re.compile(r"closed by peer|reset by peer|connection (was )?(closed|refused|reset)|broken pipe", re.I)
_WAITED = re.compile(r"timed? ?out(?: after)?(?: waiting)?(?: (?P<ms>\d+) ?ms)?", re.I)
_TORCH = ("DistBackendError", "DistNetworkError", "DistStoreError")
_PACKAGE = Path(__file__).parents[1]


class LostPeer(UserError):
    """Another process of this run does not answer."""

    exit_code = 3
    patience = 3.0
    """All ranks that still live meet this at about the same time, and rank 0 may be the one that does not."""


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error` is the word of a communication library about a process that does not answer."""
    text = str(error)
    speaks = type(error).__name__ in _TORCH or (isinstance(error, RuntimeError) and _GLOO.search(text))
    return bool(speaks and (_GONE.search(text) or _WAITED.search(text)))


def lost_peer(error: BaseException) -> LostPeer | None:
    """`error` in one line, or None if it is about something else."""
    if not is_lost_peer(error):
        return None
    waited = None if _GONE.search(str(error)) else _WAITED.search(str(error))
    again = "start the same command again to go on from the last checkpoint"
    if waited is None:
        return LostPeer(
            f"{_where(error)}: another process of this run is gone, ended or killed; its own message or the "
            f"launcher's report says why. Then {again}"
        )
    limit = f" {int(waited['ms']) / 60000:g}" if waited["ms"] else ""
    return LostPeer(
        f"{_where(error)}: another process did not answer within --distributed-timeout-minutes{limit}: it hangs or "
        f"is too slow. See what it does (py-spy dump --pid PID), then {again}; if it was only slow, raise that limit"
    )


def _where(error: BaseException) -> str:
    """The collective and the place in our code that called it."""
    call, place = "a collective", ""
    for frame in traceback.extract_tb(error.__traceback__):
        file = Path(frame.filename)
        if file.name == "distributed_c10d.py":
            call = frame.name
        elif file.is_relative_to(_PACKAGE) and file.parent != Path(__file__).parent:
            place = f" in {file.relative_to(_PACKAGE)} ({frame.name})"
    return call + place


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


def let_children_import_main() -> None:
    """Processes that this one starts shall import the file of its program, which ends with `is_child_of_program`. They
    would not after `python -m PACKAGE`: multiprocessing leaves out a main module that a package has named."""
    sys.modules["__main__"].__spec__ = None


def is_child_of_program() -> bool:
    """Whether a module is imported by such a process on behalf of its parent's program. (`__mp_main__` alone tells
    nothing: wherever multiprocessing was imported it is another name of `__main__`.)"""
    return sys.modules.get("__mp_main__") not in (None, sys.modules["__main__"])


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


_PR_SET_PDEATHSIG = 1


class _Tie:
    """What happens around each fork of this process and of its children."""

    def __init__(self) -> None:
        self.call = ctypes.CDLL(None).prctl  # looked up before the fork: afterwards as little as possible
        self.parent = 0
        os.register_at_fork(before=self.before, after_in_child=self.in_child)

    def before(self) -> None:
        # The kernel watches the thread that forks, and only the main thread lives as long as the process.
        main = threading.current_thread() is threading.main_thread()
        self.parent = os.getpid() if main else 0

    def in_child(self) -> None:
        if self.parent:
            self.call(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != self.parent:  # it ended meanwhile
                os._exit(1)


_TIED: list[_Tie] = []
"""Handlers of forks cannot be taken back: once per process."""


def end_with_parent() -> None:
    """From now on, forked children are killed when the process that forked them ends. Linux only, else nothing."""
    if not _TIED:
        with contextlib.suppress(OSError, AttributeError):
            _TIED.append(_Tie())
