"""Forked children that end with their parent: Megatron's writers of checkpoints would outlive a run that was killed.

They may wait for ever then, with the run's terminal or pipe still open. (Spawned children: see
`worker.leave_with_parent`.)
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading

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
