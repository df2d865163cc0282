"""Runs inside the sandbox, as a script of its own: a model's program against its tests. Standard library only.

`payload.json` says which and how; one line of JSON with the payload's nonce says how it went. A program that ends the
process early says nothing, and counts as wrong.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import signal
import sys
from decimal import Decimal, InvalidOperation
from unittest import mock

_STARS = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json "
    "builtins typing"
).split()
PRELUDE = (
    "".join(f"from {name} import *\n" for name in _STARS)
    + "".join(f"import {name}\n" for name in _STARS if name not in ("builtins", "typing"))
    + "sys.setrecursionlimit(50000)\n"
)
"""What LiveCodeBench lets a solution take for granted."""


class OutOfTime(Exception):
    """The test's own time limit."""


@contextlib.contextmanager
def time_limit(seconds: float):
    def ring(*_):
        raise OutOfTime

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def run_program(order: dict) -> str:
    """One program that holds its own tests (HumanEval, and the original EvalPlus sets on Hugging Face)."""
    with time_limit(order["seconds"]):
        exec(order["program"], {})
    return ""


def run_evalplus(order: dict) -> str:
    """EvalPlus' own comparison: the reference solution's outputs on all inputs are what is right."""
    import types

    from evalplus.data.mbpp import mbpp_deserialize_inputs
    from evalplus.eval import MBPP_OUTPUT_NOT_NONE_TASKS, unsafe_execute
    from evalplus.gen.util import trusted_exec

    mbpp, entry = order["dataset"] == "mbpp", order["entry_point"]
    inputs = order["base_input"] + order["plus_input"]
    if mbpp:
        inputs = mbpp_deserialize_inputs(order["task_id"], order["base_input"])
        inputs = inputs + mbpp_deserialize_inputs(order["task_id"], order["plus_input"])
    only_some = mbpp and entry in MBPP_OUTPUT_NOT_NONE_TASKS
    expected, took = trusted_exec(order["reference"], inputs, entry, True, only_some)
    limits = [max(order["seconds"], 4.0 * t) for t in took]
    state, progress, details = (
        types.SimpleNamespace(value=3),
        types.SimpleNamespace(value=0),
        [False] * len(inputs),
    )
    unsafe_execute(
        order["dataset"],
        entry,
        order["solution"],
        inputs,
        expected,
        limits,
        order["atol"],
        True,
        state,
        details,
        progress,
    )
    passed = state.value == 0 and all(details)
    return "" if passed else f"failed input {progress.value} of {len(inputs)}"


def run_functional(order: dict) -> str:
    """LiveCodeBench, LeetCode style: call the function on each test's arguments (one JSON value a line)."""
    names: dict = {"__name__": "solution"}
    exec(PRELUDE, {})  # imported before the clock runs
    with time_limit(order["seconds"]):
        exec(PRELUDE + order["solution"], names)
        owner = names["Solution"]() if "class Solution" in order["solution"] else None
    function = names[order["function"]] if owner is None else getattr(owner, order["function"])
    for number, test in enumerate(order["tests"], 1):
        arguments = [json.loads(line) for line in test["input"].split("\n")]
        with time_limit(order["seconds"]):
            got = function(*arguments)
        got = list(got) if isinstance(got, tuple) else got
        if got != json.loads(test["output"]):
            return f"wrong on test {number}"
    return ""


def run_stdin(order: dict) -> str:
    """LiveCodeBench, contest style: the program reads each test from standard input and prints its answer."""
    exec(PRELUDE, {})
    code = compile(PRELUDE + order["solution"], "solution.py", "exec")
    for number, test in enumerate(order["tests"], 1):
        out, given = io.StringIO(), io.TextIOWrapper(io.BytesIO(test["input"].encode()), encoding="utf-8")
        redirected = mock.patch("sys.stdin", given), contextlib.redirect_stdout(out)
        with redirected[0], redirected[1], time_limit(order["seconds"]), contextlib.suppress(SystemExit):
            exec(code, {"__name__": "__main__"})
        if not same_output(out.getvalue(), test["output"]):
            return f"wrong on test {number}"
    return ""


def run_gym(order: dict) -> str:
    """A reasoning-gym family whose verifier evaluates the answer."""
    import reasoning_gym

    data = reasoning_gym.create_dataset(
        order["family"], size=order["size"], seed=order["seed"], **order["arguments"]
    )
    score = data.score_answer(order["answer"], data[order["index"]])
    return "" if score >= 1.0 else f"score {score:.2f}"


def same_output(got: str, wanted: str) -> bool:
    """Equal line by line, space around them aside; lines of numbers are compared as numbers."""
    got_lines, wanted_lines = ([line.strip() for line in text.strip().split("\n")] for text in (got, wanted))
    if len(got_lines) != len(wanted_lines):
        return False
    return all(a == b or _same_numbers(a, b) for a, b in zip(got_lines, wanted_lines))


def _same_numbers(a: str, b: str) -> bool:
    try:
        return [Decimal(part) for part in a.split()] == [Decimal(part) for part in b.split()]
    except InvalidOperation:
        return False


KINDS = {
    "program": run_program,
    "evalplus": run_evalplus,
    "functional": run_functional,
    "stdin": run_stdin,
    "gym": run_gym,
}


def main() -> None:
    with open("payload.json", encoding="utf-8", errors="surrogatepass") as file:
        order = json.load(file)
    os.unlink("payload.json")
    nonce, say, leave = order.pop("nonce"), os.dup(1), os._exit
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    write, dumps = os.write, json.dumps  # the program may change the modules
    try:
        note = KINDS[order["kind"]](order)
    except OutOfTime:
        note = "out of time"
    except BaseException as error:
        note = f"{type(error).__name__}: {error}"[:200]
    write(say, dumps({"nonce": nonce, "note": note}).encode())
    leave(0)


if __name__ == "__main__":
    with contextlib.suppress(ValueError):
        sys.set_int_max_str_digits(50000)
    ast.parse("0")  # loaded before the limits of a test begin to count
    main()
