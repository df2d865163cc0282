"""Tests on several workers (pytest-xdist): a file stays on one worker, and some tests want more than that.

Processes that meet over gloo starve each other where they outnumber the cores. So the tests that start them come one
after the other, on one worker; and while those that keep every core busy run, the other workers wait.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

ALONE = ("tests/distributed/", "tests/slurm/")
"""Nothing runs beside these."""
GLOO = (
    *ALONE,
    "tests/convert/test_convert_layouts.py",
    "tests/distill/test_losses.py",
    "tests/models/test_gated_delta.py",
    "tests/tools/test_dispatch_bytes.py",
    "tests/planning/test_memory_parameters.py",
    "tests/launch/",
    "tests/ops/test_vocab_kl_parallel.py",
    "tests/runtime/test_elastic.py",
    "tests/serving/test_tools.py",
    "tests/test_soak.py",
)
"""Each starts several processes that meet."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Deals whole files, and all of GLOO to one worker."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "gloo" if nodeid.startswith(GLOO) else nodeid.split("::")[0]

    return ByFile(config, log)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outside of the time limit: waiting is not counted
def pytest_runtest_protocol(item, nextitem):
    """Runs a test when it is its turn."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    with _turn(alone=item.nodeid.startswith(ALONE)):
        return (yield)


@contextmanager
def _turn(alone: bool) -> Iterator[None]:
    """Whoever waits to be alone holds the door: no other test begins before."""
    with (
        open(os.environ["ZEDA_TESTS_TURN"] + ".door", "a") as door,
        open(os.environ["ZEDA_TESTS_TURN"], "a") as room,
    ):
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        try:
            yield
        finally:  # a child that the test has forked may live on, and would keep it
            fcntl.flock(room, fcntl.LOCK_UN)
