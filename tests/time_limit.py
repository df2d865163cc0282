"""A test that must not hang."""

import contextlib
import signal


@contextlib.contextmanager
def at_most(seconds: int):
    """Fail after so many seconds, whatever the code within waits for."""

    def ring(*_):
        raise AssertionError(f"still at it after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
