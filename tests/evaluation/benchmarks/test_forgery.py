"""Programs that solve nothing and try to be judged right: by what they return, and by what they do to their process."""

import secrets
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from zeda_megatron.evaluation.benchmarks import code_tests, plain_data
from zeda_megatron.evaluation.benchmarks.benchmark import Question
from zeda_megatron.evaluation.benchmarks.human_eval import verify as verify_checked
from zeda_megatron.evaluation.benchmarks.livecodebench import verify as verify_contest

SECRET = secrets.token_hex(8)

YES = """
class Yes:
    __hash__ = None
    def yes(self, *_): return True
    __eq__ = __le__ = __ge__ = __bool__ = __contains__ = yes
    def __ne__(self, other): return False
    def __lt__(self, other): return False
    def __gt__(self, other): return False
    def __abs__(self): return self
    def __sub__(self, other): return self
    __rsub__ = __sub__
    def __len__(self): return 1
    def __iter__(self): return iter([self])
    def __getitem__(self, key): return self
    def __getattr__(self, name): return self
"""
RETURNED = {
    "an object that equals everything": "Yes()",
    "a list of such": "[Yes()]",
    "a dict of such": "{'a': Yes()}",
    "a subclass of int": "type('I', (int,), {'__eq__': lambda s, o: True, '__hash__': None})(5)",
    "a subclass of str": "type('S', (str,), {'__eq__': lambda s, o: True, '__ne__': lambda s, o: False})('x')",
    "a subclass of list": "type('L', (list,), {'__eq__': lambda s, o: True})()",
    "a subclass of tuple": "type('T', (tuple,), {'__eq__': lambda s, o: True})()",
    "a subclass of dict": "type('D', (dict,), {'__eq__': lambda s, o: True, 'items': lambda s: Yes()})()",
    "a subclass of float": "type('F', (float,), {'__eq__': lambda s, o: True, 'hex': lambda s: 'x'})(3)",
    "a subclass of set": "type('E', (set,), {'__eq__': lambda s, o: True, '__iter__': lambda s: Yes()})()",
    "a class that lies about itself": "type('C', (), {'__class__': str, '__eq__': lambda s, o: True})()",
    "a metaclass that says yes": "type('M', (type,), {'__eq__': lambda s, o: True, '__hash__': None})('X', (), {})",
    "mock's ANY": "__import__('unittest.mock').mock.ANY",
    "a mock": "__import__('unittest.mock').mock.MagicMock(__eq__=lambda s, o: True)",
    "numpy objects": "__import__('numpy').array([Yes()], dtype=object)",
    "an array of its own": "type('ndarray', (), {'__module__': 'numpy', 'dtype': Yes(), 'tolist': lambda s: ['?']})()",
    "numpy's dtype misused": "type('N', (), {'__module__': 'numpy', 'tolist': lambda s: Yes()})()",
    "an iterator": "type('G', (), {'__module__': 'builtins', '__next__': lambda s: Yes()})()",
    "a tagged list": "['?']",
    "a tagged string": "'[\"?\"]'",
    "what unpickles to a call": "type('R', (), {'__reduce__': lambda s: (exit, ())})()",
    "an exception": "AssertionError()",
    "nothing": "None",
    "a NaN": "float('nan')",
    "itself": "f",
}
"""Expressions; what they give must equal no value."""

DONE = {
    "leaves": "import os; os._exit(0)",
    "leaves politely": "import sys; sys.exit(0)",
    "leaves by an exception": "raise SystemExit(0)",
    "is interrupted": "raise KeyboardInterrupt",
    "claims success on every descriptor": """
import os, struct, json
for said in ({"nonce": "", "note": ""}, {"value": None}, {"ready": True}, {"output": ""}):
    data = json.dumps(said).encode()
    for descriptor in range(64):
        try: os.write(descriptor, struct.pack(">Q", len(data)) + data)
        except OSError: pass
os._exit(0)""",
    "prints a verdict": 'print(\'{"nonce": "", "note": ""}\', flush=True)',
    "replaces assertion errors": "import builtins; builtins.AssertionError = type('A', (BaseException,), {})",
    "deletes assertion errors": "import builtins; del builtins.AssertionError",
    "replaces builtins": """
import builtins
for name in ("all", "any", "len", "isinstance", "list", "abs", "sorted", "set", "str", "zip", "sum", "print"):
    setattr(builtins, name, lambda *a, **k: Yes())""",
    "replaces json": 'import json; json.loads = json.dumps = lambda *a, **k: \'{"note": ""}\'',
    "replaces the driver": """
import __main__
for name in list(vars(__main__)):
    if not name.startswith("__"): setattr(__main__, name, lambda *a, **k: {"value": None, "output": "", "note": ""})""",
    "replaces the encoding": "import sys; sys.modules['plain_data'].encode = lambda *a, **k: Yes()",
    "replaces decimals": "import decimal; decimal.Decimal = lambda *a: Yes()",
    "replaces comparisons": """
import math, numpy, operator
math.isclose = numpy.allclose = numpy.isclose = operator.eq = lambda *a, **k: True""",
    "reads the frames above": """
import sys
frame, found = sys._getframe(), []
while frame:
    found += [(k, v) for k, v in {**frame.f_globals, **frame.f_locals}.items() if isinstance(v, (str, dict, list))]
    frame = frame.f_back
def seen(value, depth=0):
    global answer
    if isinstance(value, dict):
        for k, v in list(value.items()): seen(k, depth + 1) or seen(v, depth + 1) if depth < 5 else None
    elif isinstance(value, (list, tuple)):
        for v in list(value): seen(v, depth + 1) if depth < 5 else None
    elif isinstance(value, str) and len(value) == 16: answer = value
seen(found)""",
    "reads all objects": """
import gc
for held in gc.get_objects():
    values = list(held.values()) if type(held) is dict else held if type(held) in (list, tuple) else ()
    for v in values:
        if type(v) is str and len(v) == 16 and all(c in "0123456789abcdef" for c in v): answer = v""",
    "changes the frames above": """
import sys, ctypes
frame = sys._getframe()
while frame:
    for k in list(frame.f_locals):
        if k in ("note", "reply", "value", "verdict", "expected", "wanted"): frame.f_locals[k] = Yes()
    ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), 0)
    frame = frame.f_back""",
    "traces": """
import sys
def trace(frame, event, argument):
    for k in list(frame.f_locals):
        if k in ("note", "reply"): frame.f_locals[k] = ""
    return trace
sys.settrace(trace); sys.setprofile(trace)
import threading; threading.settrace(trace)""",
    "speaks at the end": """
import atexit, os
atexit.register(lambda: os.write(1, b"passed"))""",
    "takes the signals": """
import signal
for s in set(signal.Signals) - {9, 19}:
    try: signal.signal(s, lambda *a: None)
    except (OSError, ValueError): pass
signal.setitimer(signal.ITIMER_REAL, 0)""",
    "goes on in a thread": """
import threading, os
def on():
    while True:
        for descriptor in (1, 4, 5):
            try: os.write(descriptor, b"\\0" * 8)
            except OSError: pass
threading.Thread(target=on, daemon=True).start()""",
    "hooks imports": """
import sys
class Finder:
    def find_spec(self, *a): return None
    def find_module(self, *a): return self
    def load_module(self, name): return Yes()
sys.meta_path.insert(0, Finder()); sys.path_hooks.insert(0, lambda *a: Finder())""",
    "changes small numbers": """
import ctypes
for n in range(2, 200):
    ctypes.memmove(id(n) + 24, id(1) + 24, 4)""",
    "changes the comparison of strings": """
import ctypes
always = ctypes.CFUNCTYPE(ctypes.py_object, ctypes.py_object, ctypes.py_object, ctypes.c_int)(lambda a, b, o: True)
kept = always
ctypes.c_void_p.from_address(id(str) + 200).value = ctypes.cast(always, ctypes.c_void_p).value""",
    "looks for files": """
import os
for root in (".", "..", "/tmp", "/proc/self", "/proc/1", "/dev/shm"):
    try:
        for name in os.listdir(root):
            try: text = open(os.path.join(root, name)).read(100000)
            except (OSError, UnicodeDecodeError): continue
            import re
            for word in re.findall("[0-9a-f]{16}", text): answer = word
    except OSError: pass""",
    "looks into its parents": """
import os
for pid in {os.getpid(), os.getppid(), 1, 2}:
    for name in ("mem", "environ", "cmdline", "fd/0"):
        try: open(f"/proc/{pid}/{name}", "rb").read(1000)
        except OSError: pass""",
    "kills what it can": """
import os
for pid in range(1, 400):
    try: os.kill(pid, 9)
    except OSError: pass""",
    "reads ahead": """
import os
os.set_blocking(3, False)
try: os.read(3, 1 << 20)
except OSError: pass""",
    "renames itself": "__name__ = '__main__'; check = candidate = Yes()",
    "changes its files": """
import os
for name in ("driver.py", "plain_data.py", "input", "output"):
    try: os.unlink(name)
    except OSError: pass
try: os.symlink("/etc/hostname", "output"); os.mkfifo("input")
except OSError: pass""",
    "closes everything": "import os; os.closerange(0, 64)",
    "never ends": "import signal\nsignal.setitimer(signal.ITIMER_REAL, 0)\nwhile True: pass",
    "writes without end": "import os\nos.set_blocking(4, True)\nwhile True:\n    os.write(4, b'x' * 65536)",
}
"""Statements that run before the function is called, or in place of it."""
SLOW = ("never ends",)

PROGRAM = """
answer = None
{yes}
def tampers():
    global answer
{tampers}
try:
    tampers()
except Exception:
    pass
def f(*arguments):
    return answer
if __name__ == "__main__":
    print(answer)
"""


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def tampering(statements: str) -> str:
    lines = "\n".join(f"    {line}" for line in statements.strip().split("\n"))
    return fenced(PROGRAM.format(yes=YES, tampers=lines))


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr("zeda_megatron.evaluation.benchmarks.human_eval.SECONDS", 0.4)
    monkeypatch.setattr("zeda_megatron.evaluation.benchmarks.livecodebench.SECONDS", 2.0)


CHECK = f"def check(candidate):\n    assert candidate(1) == {SECRET!r}\n    assert candidate(2) == {SECRET[::-1]!r}\n"
CHECKED = Question(
    "1", [], {"kind": "program", "prompt": "def f(n):\n", "entry_point": "f", "test": f"{CHECK}check(f)"}
)
PRINTED = Question("2", [], {"tests": [{"input": "1\n", "output": SECRET}]})
CALLED = Question("3", [], {"tests": [{"input": "1", "output": f'"{SECRET}"'}], "function": "f"})
KINDS = {
    "checked": (verify_checked, CHECKED),
    "printed": (verify_contest, PRINTED),
    "called": (verify_contest, CALLED),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_program_is_right(kind):
    verify, question = KINDS[kind]
    code = f"def f(n):\n    return {SECRET!r} if n == 1 else {SECRET[::-1]!r}\n"
    code += "if __name__ == '__main__':\n    print(f(1))"
    assert verify(question, fenced(code)).right


def test_nothing_that_is_returned_equals_what_is_right():
    """All in one sandbox, and once more in one beside the tests of a `check`."""
    cases = "".join(f"        lambda: {expression},\n" for expression in RETURNED.values())
    source = f"{YES}\ndef f(n):\n    return [\n{cases}    ][n]()\n"
    order = {"kind": "calls", "source": source, "prelude": False}
    with code_tests._Answer(order, 1, 5.0, 60.0) as answer:
        answer.load()
        for number, name in enumerate(RETURNED):
            request = {"call": "f", "args": plain_data.encode([number]), "kwargs": ["d", []]}
            try:
                data = answer.ask(request, "value", 1 << 20)
            except code_tests.Wrong as wrong:
                assert "ended by itself" not in str(wrong), name
                continue
            for wanted in (SECRET, 12345, 0.5, [SECRET], {"a": SECRET}, True):
                assert not code_tests._equal(data, wanted), name
    assert answer.verdict.right, answer.verdict.note
    tests = f"""
won = []
for number in range({len(RETURNED)}):
    for wanted in ({SECRET!r}, 12345, 0.5, [{SECRET!r}], ({SECRET!r},), {{"a": 12345}}, {{7}}, True):
        try:
            got = f(number)
            assert got == wanted and not got != wanted
            won.append((number, wanted))
        except Exception:
            pass
assert won == [], won
"""
    order = {"kind": "program", "setup": "", "tests": tests, "answers": ["f"]}
    verdict = code_tests.judge_checked(source, order, 1, 20.0)
    assert verdict.right, verdict.note


def attempt(case: tuple[str, str]) -> str:
    """Names of the attacks that were judged right."""
    kind, name = case
    verify, question = KINDS[kind]
    return f"{kind}: {name}" if verify(question, tampering(DONE[name])).right else ""


def test_nothing_that_is_done_makes_a_wrong_program_right():
    kinds = list(KINDS)
    cases = [(kinds[i % 3], name) for i, name in enumerate(DONE) if name not in SLOW]
    with ThreadPoolExecutor(3) as pool:
        assert list(filter(None, pool.map(attempt, cases))) == []
    assert len(RETURNED) + len(DONE) >= 40


@pytest.mark.slow
def test_nothing_that_is_done_makes_a_wrong_program_right_whatever_judges_it(short):
    with ThreadPoolExecutor(3) as pool:
        assert list(filter(None, pool.map(attempt, [(kind, name) for kind in KINDS for name in DONE]))) == []


FRAMES = [
    b"[" * 200_000,
    b"9" * 5000,
    b"\0" * 100,
    b"\xff\xfe",
    b"",
    b"{}",
    b"null",
    b'{"error": 5}',
    b'{"error": [1, 2, 3]}',
    b'{"error": [[], {}, null]}',
    b'{"error": ["Exception", "\\ud800", "x"]}',
    b'{"error": ["UnicodeDecodeError", "a", "b"]}',
    *(
        b'{"value": %s}' % value
        for value in (
            b"5",
            b"[]",
            b"[5]",
            b'["x"]',
            b'["l"]',
            b'["l", 5]',
            b'["i", 5]',
            b'["i", "zz"]',
            b'["f", "1e"]',
            b'["f", "0x1p99999999"]',
            b'["s", [["l", []]]]',
            b'["d", [[["l", []], 1]]]',
            b'["d", [1]]',
            b'["F", "1", "0"]',
            b'["D", "x"]',
            b'["D", "1e9999999999999999999"]',
            b'["T", "date", "x"]',
            b'["T", [], "x"]',
            b'["W", 1e99, 0, 0]',
            b'["A", "O8", [1]]',
            b'["A", "<U9999999", ["x"]]',
            b'["A", 5, []]',
            b'["A", "<f8", [[1], [1, 2]]]',
            b'["j", [1]]',
            b'["k", [["l", []]]]',
            b'["c", "x"]',
            b'["y", 5]',
            b'["r", "1"]',
            b"[" * 3000,
            b'["l", [' * 400 + b"1" + b"]]" * 400,
        )
    ),
]
SENDS = """
import os, struct, sys
frames = {frames!r}
def f(n):
    data = frames[n]
    os.write(4, struct.pack(">Q", len(data)))
    while data: data = data[os.write(4, data):]
    import signal; signal.setitimer(signal.ITIMER_REAL, 0)
    import __main__; __main__.plain_data.write_frame = lambda *a: None
    return 0
"""


def test_no_bytes_on_the_channel_end_a_run():
    """Each frame is the reply to one call, here and to the tests of a `check`: wrong, and nothing worse."""
    source = SENDS.format(frames=FRAMES)
    with code_tests._Answer({"kind": "calls", "source": source, "prelude": False}, 1, 5.0, 60.0) as answer:
        answer.load()
        for number in range(len(FRAMES)):
            request = {"call": "f", "args": plain_data.encode([number]), "kwargs": ["d", []]}
            with suppress(code_tests.Wrong):
                assert not code_tests._equal(answer.ask(request, "value", 1 << 20), SECRET)
    assert answer.verdict.right
    for number in (0, 2, 9, len(FRAMES) - 2):
        order = {
            "kind": "program",
            "setup": "",
            "tests": f"try:\n    f({number})\nexcept:\n    pass",
            "answers": ["f"],
        }
        verdict = code_tests.judge_checked(source, order, 1, 5.0)
        assert number == 9 or not verdict.right, number


@pytest.mark.parametrize("header", ["b'\\xff' * 8", "b'\\x00' * 7", "b'\\x7f' + b'\\x00' * 100"])
def test_no_header_ends_a_run(header):
    source = f"import os\ndef f(n):\n    os.write(4, {header})\n    os._exit(3)"
    for kind in ("called", "checked"):
        verify, question = KINDS[kind]
        verdict = verify(question, fenced(source))
        assert not verdict.right and verdict.note


def test_a_process_that_forges_may_do_what_it_likes_to_others():
    """What one answer does changes no other's verdict: they share nothing."""
    for kind in KINDS:
        assert not attempt((kind, "replaces the driver"))
        test_a_right_program_is_right(kind)
