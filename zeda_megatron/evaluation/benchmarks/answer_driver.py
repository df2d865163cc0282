"""Runs inside the sandbox, as a script of its own: a model's program, asked for results. Standard library only.

Requests come on standard input, replies go to standard output, each a frame (`plain_data.py`). What is right is not
known here: whatever the program does to this process, it can only change what it says its results are.
"""

import ast
import contextlib
import gc
import io
import os
import signal
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import plain_data

sys.path.pop(0)
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


class OutOfTime(BaseException):
    """The time limit of this request."""


@contextlib.contextmanager
def time_limit(seconds):
    def ring(*_):
        raise OutOfTime

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Calls:
    """A program whose functions are called: `{"source", "prelude"}`, then `{"call", "args", "kwargs"}`."""

    def __init__(self, order):
        self.names = {"__name__": "solution"}
        if order["prelude"]:
            exec(PRELUDE, self.names)
        exec(compile(order["source"], "solution.py", "exec"), self.names)
        self.owner = (
            self.names["Solution"]() if order["prelude"] and "class Solution" in order["source"] else None
        )

    def reply(self, request):
        name = request["call"]
        function = self.names[name] if self.owner is None else getattr(self.owner, name)
        arguments, named = plain_data.decode(request["args"]), plain_data.decode(request["kwargs"])
        return {"value": plain_data.encode(function(*arguments, **named), opaque=True)}


class Prints:
    """A program that reads standard input and prints: `{"source"}`, then `{"input", "most"}`."""

    def __init__(self, order):
        exec(PRELUDE, {})  # imported before the clock runs
        self.code = compiled(order["source"])

    def reply(self, request):
        """Standard input and output are files of their own, so that every way to read and print works."""
        with open("input", "wb") as file:
            file.write(request["input"].encode("utf-8", "surrogatepass"))
        for stream, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)):
            opened = os.open("input" if stream == 0 else "output", flags, 0o600)
            if opened != stream:
                os.dup2(opened, stream)
                os.close(opened)
        sys.stdin = sys.__stdin__ = io.TextIOWrapper(
            io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8"
        )
        mine = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), encoding="utf-8")
        sys.stdout = sys.__stdout__ = mine
        names = {"__name__": "__main__"}
        exec(PRELUDE, names)
        with contextlib.suppress(SystemExit):
            exec(self.code, names)
        for stream in (sys.stdout, mine):
            with contextlib.suppress(AttributeError, ValueError):
                stream.flush()
        # Files that it opened are closed, and so written, before the next test has descriptors of their numbers.
        names.clear()
        sys.stdin = sys.__stdin__ = sys.stdout = sys.__stdout__ = None
        gc.collect()
        with open("output", "rb") as file:
            return {"output": file.read(request["most"] + 1).decode("utf-8", "replace")}


def compiled(source):
    """The program's code. LiveCodeBench's runner makes a function of it, in which `return` and `nonlocal` are allowed:
    where it is no program without, it is one here, too."""
    try:
        return compile(source, "solution.py", "exec")
    except SyntaxError:
        tree = ast.parse(source)
        kinds = ast.Import | ast.ImportFrom
        imports = [part for part in tree.body if isinstance(part, kinds)]
        body = [part for part in tree.body if not isinstance(part, kinds)]
        whole = ast.parse("def wrapped_function():\n    pass\nwrapped_function()")
        whole.body[0].body = body or whole.body[0].body
        whole.body[:0] = imports
        return compile(ast.fix_missing_locations(whole), "solution.py", "exec")


KINDS = {"calls": Calls, "prints": Prints}


def said(error):
    """An error as data: the built-in exception that it is, and its text."""
    kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
    try:
        text = str(error)[:200]
    except BaseException:
        text = ""
    return {"error": [kinds[0], type(error).__name__[:80], text]}


def main():
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    running = None
    while True:
        try:
            request = plain_data.loads(plain_data.read_frame(requests))
        except EOFError:
            os._exit(0)
        try:
            with time_limit(request["seconds"]):
                if running is None:
                    running = KINDS[request["kind"]](request)
                    reply = plain_data.dumps({"ready": True})
                else:
                    reply = plain_data.dumps(running.reply(request))
        except OutOfTime:
            reply = plain_data.dumps({"error": ["OutOfTime", "OutOfTime", "out of time"]})
        except BaseException as error:
            reply = plain_data.dumps(said(error))
        plain_data.write_frame(replies, reply)


if __name__ == "__main__":
    with contextlib.suppress(ValueError):
        sys.set_int_max_str_digits(50000)
    ast.parse("0")  # loaded before the limits of a request begin to count
    main()
