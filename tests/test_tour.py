"""The tour in docs/tour.md, typed word for word."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NUMBER = r"-?\d+(\.\d+)?"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_tour_can_be_walked_and_prints_what_it_says(tmp_path):
    """Numbers may differ with the processor, but the number of equal answers."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said = ""
    for kind, text in re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs/tour.md").read_text(), re.DOTALL):
        if kind == "text":
            for line in text.splitlines():
                words = (
                    NUMBER if re.fullmatch(NUMBER + "%?", word) else re.escape(word) for word in line.split()
                )
                assert re.search(r"%?\s+".join(words), said), f"{line}\n{said}"
            continue
        lines = [line for line in text.splitlines() if not line.startswith("pip install")]
        command = ["bash", "-ec"] if kind == "bash" else [sys.executable, "-c"]
        done = subprocess.run(
            [*command, "\n".join(lines)], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
    assert "-2.8" in said and "0.5" in said
