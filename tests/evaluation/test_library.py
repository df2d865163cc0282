"""A library that is not there ends a command in one line that says what to install."""

import subprocess
import sys

import pytest

CODE = """
import sys

sys.modules[{missing!r}] = None
from zeda_megatron.errors import run_main
from zeda_megatron.evaluation.__main__ import main

run_main(lambda: main(["report", "--runs", "a", "--output", "b"]))
"""


@pytest.mark.parametrize("missing", ["scipy"])
def test_a_missing_library_is_named_with_what_installs_it(missing):
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(missing=missing)], capture_output=True, text=True
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"{missing} cannot be imported" in done.stderr
    assert "pip install -e '.[evaluation]'" in done.stderr
