"""Judge a program: run it with its tests in the sandbox."""

from __future__ import annotations

import json
import secrets
from functools import cache
from pathlib import Path

from ...errors import UserError
from ..sandbox.limits import MIB, Limits
from ..sandbox.run import run_program
from .benchmark import Verdict

_STARTING = 5.0
"""Seconds for the interpreter and its imports."""


@cache
def _driver() -> str:
    return Path(__file__).with_name("code_driver.py").read_text(encoding="utf-8")


def judge(order: dict, tests: int, seconds: float, most: float = 300.0) -> Verdict:
    """Right if the driver says so.

    Args:
        order: what `code_driver.py` is to do: `kind` and its arguments.
        tests: how many tests there are; `seconds` are allowed for each, `most` for all together.

    Raises `UserError` if the sandbox does not start: no verdict is better than a wrong one.
    """
    nonce = secrets.token_hex(16)
    payload = json.dumps({**order, "seconds": seconds, "nonce": nonce})
    limits = Limits(
        seconds=min((seconds + 1) * tests, most) + _STARTING, disk=max(64 * MIB, 2 * len(payload) + 32 * MIB)
    )
    outcome = run_program({"driver.py": _driver(), "payload.json": payload}, ["driver.py"], limits)
    if outcome.reason == "sandbox":
        raise UserError(f"the sandbox did not start: {outcome.stderr.strip()[-200:] or 'it said nothing'}")
    if outcome.reason != "exit":
        return Verdict(False, {"time": "out of time", "output": "wrote too much"}[outcome.reason])
    try:
        said = json.loads(outcome.stdout)
    except json.JSONDecodeError:
        said = None
    if not isinstance(said, dict) or said.get("nonce") != nonce:
        return Verdict(False, f"ended by itself, exit code {outcome.code}")
    return Verdict(said["note"] == "", said["note"])
