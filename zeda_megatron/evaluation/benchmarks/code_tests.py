"""Judge a program: it runs in the sandbox and only says results; what is right is compared elsewhere.

Standard input and functions of contest problems are compared here; tests that are programs themselves run in a second
sandbox and call the answer through this process. So nothing of a verdict is ever in the answer's interpreter.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from decimal import Decimal, DecimalException
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..sandbox.run import MIB, Ended, Limits, Program
from . import plain_data
from .benchmark import Verdict

_STARTING = 5.0
"""Seconds for an interpreter and its imports."""
_GRACE = 2.0
"""Seconds beyond a test's limit until the process is ended that should have kept it."""
_MOST = MIB
"""Bytes that a result may have beyond a multiple of what is right."""
_MOST_CALLED = 64 * MIB
"""Bytes of one call's arguments, or result."""
_WHY = {"time": "out of time", "output": "wrote too much"}


def judge_printed(source: str, tests: list[dict], seconds: float, most: float = 300.0) -> Verdict:
    """Right if the program prints each test's `output` for its `input` (texts); the first that fails ends it.

    Args:
        seconds: allowed for each test; `most` for all together.

    Raises `UserError` if the sandbox does not start: no verdict is better than a wrong one.
    """
    with _Answer({"kind": "prints", "source": source}, len(tests), seconds, most) as answer:
        answer.load()
        for number, test in enumerate(tests, 1):
            cap = 4 * len(test["output"].encode("utf-8", "replace")) + _MOST
            got = answer.ask({"input": test["input"], "most": cap}, "output", 6 * cap)
            if not isinstance(got, str) or not same_output(got, test["output"]):
                raise Wrong(f"wrong on test {number}")
    return answer.verdict


def judge_called(
    source: str, function: str, tests: list[tuple[list, Any, int]], seconds: float, most: float = 300.0
) -> Verdict:
    """The same for a function (of `Solution`, if the program has one). Each test: its arguments, what is right, and
    the length of that as text."""
    order = {"kind": "calls", "source": source, "prelude": True}
    with _Answer(order, len(tests), seconds, most) as answer:
        answer.load()
        for number, (arguments, wanted, length) in enumerate(tests, 1):
            request = {"call": function, "args": plain_data.encode(arguments), "kwargs": ["d", []]}
            if not _equal(answer.ask(request, "value", 16 * length + _MOST), wanted):
                raise Wrong(f"wrong on test {number}")
    return answer.verdict


def judge_checked(source: str, order: dict, tests: int, seconds: float, most: float = 300.0) -> Verdict:
    """Right if the tests of an order say so (see `check_driver.py`), which call the program `source`."""
    with _Answer({"kind": "calls", "source": source, "prelude": False}, tests, seconds, most) as answer:
        answer.load()
        deadline = time.monotonic() + answer.life

        def call(said: dict) -> bytes:
            return answer.reply({**said, "seconds": seconds}, deadline, _MOST_CALLED)

        _check({**order, "seconds": seconds}, answer.life, call)
    return answer.verdict


def judge_evaluated(order: dict, seconds: float) -> Verdict:
    """Right if a verifier says so that evaluates the answer itself: one sandbox holds both."""
    try:
        _check({**order, "seconds": seconds}, seconds + 1 + _STARTING, None)
    except Wrong as wrong:
        return Verdict(False, str(wrong))
    return Verdict(True)


def _check(order: dict, seconds: float, call: Callable[[dict], bytes] | None) -> None:
    """Run tests in a sandbox of their own. Raises `Wrong` unless they pass."""
    nonce = secrets.token_hex(16)
    message, deadline = plain_data.dumps({**order, "nonce": nonce}), time.monotonic() + seconds
    with Program(_files("check_driver.py"), ["driver.py"], _limits(seconds, len(message))) as tests:
        while True:
            try:
                said = plain_data.loads(tests.ask(message, deadline, _MOST_CALLED))
            except Ended as ended:
                raise Wrong(_ending(ended)) from None
            except ValueError:
                said = None
            if not (isinstance(said, dict) and "call" in said and call is not None):
                break
            message = call(said)
    if not isinstance(said, dict) or said.get("nonce") != nonce or not isinstance(said.get("note"), str):
        raise Wrong("its tests gave no verdict")
    if said["note"]:
        raise Wrong(said["note"])


class Wrong(Exception):
    """The verdict is clear."""


class _Answer:
    """The answer's program in its sandbox; a context manager, in which `Wrong` becomes the verdict."""

    def __init__(self, order: dict, tests: int, seconds: float, most: float):
        self.order, self.seconds, self.verdict = order, seconds, Verdict(True)
        self.life = min((seconds + 1) * tests, most) + _STARTING
        limits = _limits(self.life + seconds + _STARTING, len(order["source"]))
        self.program = Program(_files("answer_driver.py"), ["driver.py"], limits)

    def __enter__(self) -> _Answer:
        self.program.__enter__()
        return self

    def __exit__(self, kind, error, trace) -> bool:
        self.program.__exit__(kind, error, trace)
        if isinstance(error, Wrong):
            self.verdict = Verdict(False, str(error))
        return isinstance(error, Wrong)

    def load(self) -> None:
        """Run the program's top level."""
        self.ask({**self.order, "seconds": self.seconds}, "ready", _MOST, _STARTING)

    def reply(self, request: dict, deadline: float, most: int) -> bytes:
        """What it says, whatever that is. Raises `Wrong` if it says nothing in time."""
        try:
            return self.program.ask(plain_data.dumps(request), deadline, most)
        except Ended as ended:
            raise Wrong(_ending(ended)) from None

    def ask(self, request: dict, key: str, most: int, more: float = 0.0) -> Any:
        """One result, still as data. Raises `Wrong` if there is none."""
        deadline = time.monotonic() + self.seconds + _GRACE + more
        try:
            said = plain_data.loads(self.reply({**request, "seconds": self.seconds}, deadline, most))
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise Wrong("its result is no data")
        if key in said:
            return said[key]
        error = said.get("error")
        if isinstance(error, list) and len(error) == 3:
            kind, name, text = (str(part)[:200] for part in error)
            raise Wrong("out of time" if kind == "OutOfTime" else f"{name}: {text}"[:200])
        raise Wrong("its result is no data")


def _limits(seconds: float, size: int) -> Limits:
    return Limits(seconds=seconds, disk=max(64 * MIB, 2 * size + 32 * MIB))


def _ending(ended: Ended) -> str:
    """Why a program gave no result. Raises `UserError` if it never started."""
    if ended.reason == "sandbox":
        raise UserError(f"the sandbox did not start: {ended.said[-200:] or 'it said nothing'}")
    return _WHY.get(ended.reason, f"ended by itself, exit code {ended.code}")


@cache
def _files(driver: str) -> dict[str, str]:
    here = Path(__file__).parent
    return {
        "driver.py": (here / driver).read_text(encoding="utf-8"),
        "plain_data.py": (here / "plain_data.py").read_text(encoding="utf-8"),
    }


def same_output(got: str, wanted: str) -> bool:
    """Equal line by line, space around them aside; lines of numbers are compared as numbers."""
    got_lines, wanted_lines = ([line.strip() for line in text.strip().split("\n")] for text in (got, wanted))
    if len(got_lines) != len(wanted_lines):
        return False
    return all(a == b or _same_numbers(a, b) for a, b in zip(got_lines, wanted_lines))


def _same_numbers(a: str, b: str) -> bool:
    try:
        return [Decimal(part) for part in a.split()] == [Decimal(part) for part in b.split()]
    except (DecimalException, ValueError):
        return False


def _equal(data: Any, wanted: Any) -> bool:
    """Whether a result is what JSON says is right; a tuple counts as a list, as in LiveCodeBench's runner."""
    try:
        value = plain_data.decode(data, hashing=False)
        value = list(value) if isinstance(value, tuple) else value
        return bool(value == wanted)
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError):
        return False
