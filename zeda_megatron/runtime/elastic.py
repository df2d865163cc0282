"""torchrun with manners: `python -m zeda_megatron.runtime.elastic [torchrun's flags] SCRIPT [its flags]`.

Three differences to plain torchrun, all for the one who waits for the command to end:
- the exit code is that of the first worker that failed (torchrun: always 1);
- a user's mistake (exit code 2) and a rank that hangs (3) stay the one line that the worker printed;
- SIGTERM, SIGUSR1 and Ctrl-C go to the workers, which save and end in their own time (torchrun: SIGTERM, killed after
  30 seconds, exit code 1 even if all went well; SIGUSR1 ends torchrun and leaves the workers behind). A second Ctrl-C
  ends them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys

MISSED = 3
"""Exit code of a worker that another one did not answer."""

STOPPED = 75
"""Customary code of a program that wants to be started again (EX_TEMPFAIL of sysexits.h)."""
TOLD = (2, MISSED, STOPPED)
"""Exit codes of a worker that has told the user what is wrong: a mistake, a process that does not answer, a stop before
the end (where --stopped-exit-code asks for 75)."""

_NOISY = (
    "torch.distributed.elastic.multiprocessing.api",
    "torch.distributed.elastic.multiprocessing.errors.error_handler",
)
"""They repeat exit codes line by line; the report below says the same once."""


class _Forward:
    """Hands the signals that ask for a save to the workers."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.received = 0
        for number in self.SIGNALS:
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame) -> None:
        import psutil

        self.received = number
        workers = psutil.Process().children()
        if not workers:  # nothing has begun
            sys.exit(128 + number)
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.send_signal(number)


def main(arguments: list[str]) -> int:
    """Run torchrun's own main. Returns the exit code."""
    # torchrun would turn SIGTERM into its own exception; PyTorch without this switch does so, see below.
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGHUP,SIGQUIT")
    forward = _Forward()
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if "LOGLEVEL" not in os.environ:
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        run.main(arguments)
    except ChildFailedError as error:
        failure = _cause(error)
        code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        if forward.received and failure.exitcode == -forward.received:
            name = signal.Signals(forward.received).name
            print(f"stopped by {name} before the first step: nothing to save", file=sys.stderr)
        elif code not in TOLD:
            print(error, file=sys.stderr)
        return code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _cause(error):
    """The failure that the others followed. Workers that miss one (exit code 3) may end before torchrun, which looks
    now and then, has seen that it is gone."""
    _, first = error.get_first_failure()
    return next((failure for failure in error.failures.values() if failure.exitcode != MISSED), first)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
