"""SIGTERM, SIGUSR1 and Ctrl-C ask a run to save and end; all ranks decide together at the end of a step."""

from __future__ import annotations

import signal
import sys
import time

import torch

from ..runtime.agreement import rank
from ..runtime.process_groups import device


def exit_code_if_stopped(code: int) -> int:
    """Exit code of this rank: rank 0 speaks for the run, so that no launcher ends it while it tidies up."""
    return code if rank() == 0 else 0


class StopRequest:
    """Remembers signals. Use as a context manager so that the old handlers come back.

    A second Ctrl-C ends the run at once. One that follows within `SAME_SECONDS` is the same: a terminal sends it to all
    processes of its group, and launchers pass it on besides.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    SAME_SECONDS = 0.5

    def __init__(self) -> None:
        self.received = 0
        self._asked = 0.0
        self._old: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in self.SIGNALS:
            self._old[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _remember(self, number, frame) -> None:
        self.received = number
        if number != signal.SIGINT:
            return
        before, self._asked = self._asked, time.monotonic()
        if not before:
            if rank() == 0:
                print("stopping after this step (Ctrl-C again: at once)", file=sys.stderr, flush=True)
        elif self._asked - before > self.SAME_SECONDS:
            raise KeyboardInterrupt

    def agreed(self) -> bool:
        """True on all ranks as soon as any of them was signalled."""
        if torch.distributed.get_world_size() == 1:
            return bool(self.received)
        flag = torch.tensor([self.received], device=device())
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())
