"""A library that is not there ends a command in one line that says what to install."""

import subprocess
import sys

import pytest

from zeda_megatron.errors import UserError
from zeda_megatron.evaluation.library import library

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
