"""Runs inside a sandbox of its own, as a script: a benchmark's tests, which call a program that runs elsewhere.

Standard input brings the order and then replies, standard output takes calls and at last the verdict, each a frame
(`plain_data.py`). The program's interpreter is another process: between them go arguments and results, as data.
"""

import ast
import builtins
import contextlib
import os
import signal
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import plain_data

sys.path.pop(0)


class Lost(BaseException):
    """The program has ended, or the tests want of it what no other process can have."""


class OutOfTime(BaseException):
    """The tests' time limit."""


class Line:
    """The way to the program."""

    def __init__(self, requests, replies):
        self.requests, self.replies = requests, replies
        self.lost = ""
        """Why there can be no more results: tests that swallow exceptions do not swallow this."""

    def function(self, name):
        def remote(*arguments, **named):
            return self.call(name, arguments, named)

        remote.__name__ = name
        return remote

    def call(self, name, arguments, named):
        if self.lost:
            raise Lost(self.lost)
        try:
            given = {"args": plain_data.encode(list(arguments)), "kwargs": plain_data.encode(named)}
        except plain_data.NotPlain as error:
            self._lose(f"the tests pass what no other process can have: {error}")
        plain_data.write_frame(self.replies, plain_data.dumps({"call": name, **given}))
        try:
            reply = plain_data.loads(plain_data.read_frame(self.requests))
            if not isinstance(reply, dict):
                raise ValueError("no reply")
            if "value" in reply:
                return plain_data.decode(reply["value"])
            kind, name, text = map(str, reply["error"])
        except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
            self._lose(f"its result is no data ({type(error).__name__})")
        found = getattr(builtins, kind, None)
        if not (isinstance(found, type) and issubclass(found, Exception)):
            self._lose(f"{name}: {text}")
        try:
            error = found(text)
        except TypeError:
            error = RuntimeError(f"{name}: {text}")
        raise error

    def _lose(self, why):
        self.lost = self.lost or why
        raise Lost(self.lost)


def run_program(order, line):
    """Tests that are a program, such as `check(candidate)`. Names that neither they nor the prompt define are the
    answer's functions."""
    names = {"__name__": "tests"}
    exec(order["setup"], names)
    tree = ast.parse(order["tests"])
    wanted = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | set(order["answers"])
    for name in wanted:
        if name in order["answers"] or not (name in names or hasattr(builtins, name)):
            names[name] = line.function(name)
    exec(compile(tree, "tests.py", "exec"), names)
    return ""


def run_evalplus(order, line):
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
    state, progress = types.SimpleNamespace(value=3), types.SimpleNamespace(value=0)
    details = [False] * len(inputs)
    builtins.zeda_answer = line.function(entry)
    unsafe_execute(
        order["dataset"],
        entry,
        f"{entry} = zeda_answer",
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


def run_gym(order, line):
    """A reasoning-gym family whose verifier evaluates the answer, in this process."""
    import reasoning_gym

    data = reasoning_gym.create_dataset(
        order["family"], size=order["size"], seed=order["seed"], **order["arguments"]
    )
    score = data.score_answer(order["answer"], data[order["index"]])
    return "" if score >= 1.0 else f"score {score:.2f}"


KINDS = {"program": run_program, "evalplus": run_evalplus, "gym": run_gym}


def main():
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    order = plain_data.loads(plain_data.read_frame(requests))
    nonce, write, leave, line = order.pop("nonce"), os.write, os._exit, Line(requests, replies)

    def ring(*_):
        raise OutOfTime

    try:
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, order["seconds"] if order["kind"] != "evalplus" else 0)
        note = KINDS[order["kind"]](order, line)
    except OutOfTime:
        note = "out of time"
    except BaseException as error:
        note = f"{type(error).__name__}: {error}"[:200]
    signal.setitimer(signal.ITIMER_REAL, 0)
    verdict = plain_data.dumps({"nonce": nonce, "note": line.lost or note})
    plain_data.write_frame(replies, verdict, write)
    leave(0)


if __name__ == "__main__":
    with contextlib.suppress(ValueError):
        sys.set_int_max_str_digits(50000)
    main()
