"""One line, whatever a message was made of."""

import pickle
import subprocess
import sys

import pytest

from zeda_megatron.errors import LINE_WIDTH, VALUE_WIDTH, UserError, library, shown


def test_a_message_is_one_printable_line_of_bounded_length():
    error = UserError("file: \x1b[31mred\r\n  second line\n\ud800\u202e end; do that")
    assert str(error) == r"file: \x1b[31mred second line \ud800\u202e end; do that"
    long = str(UserError("begin " + "x" * 10_000_000 + " end; do that"))
    assert len(long) <= LINE_WIDTH and long.startswith("begin x") and long.endswith("x end; do that")
    assert str(UserError("naïve — 模型 ✓ file")) == "naïve — 模型 ✓ file"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_values_are_cut_to_a_screens_width():
    for value in ("x" * 1_000_000, 10**5000, [["a"] * 9] * 10**6, {i: "b" * 99 for i in range(99)}):
        assert len(shown(value)) <= VALUE_WIDTH


def test_a_small_value_is_shown_as_it_is():
    assert [shown(v) for v in ("a b", 1.5, None, ["x", 2])] == ["'a b'", "1.5", "None", "['x', 2]"]


def test_values_that_contain_themselves_many_times_are_not_walked():
    laughs = ["ha"] * 9
    for _ in range(60):
        laughs = [laughs] * 9
    assert len(shown(laughs)) <= VALUE_WIDTH


CODE = """
import sys

sys.modules["matplotlib"] = None
from zeda_megatron.__main__ import main
from zeda_megatron.runtime.worker import run_worker

run_worker(lambda: main(["evaluate", "report", "--runs", "a", "--output", "b"]))
"""


def test_a_missing_library_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(UserError, match=r"scipy cannot be imported .*: pip install -e '.\[evaluation\]'"):
        library("scipy.stats")


def test_a_report_without_matplotlib_ends_in_one_line():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "matplotlib cannot be imported" in done.stderr and "pip install" in done.stderr
