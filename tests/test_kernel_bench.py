"""The benchmark of the kernels walks through every back end that runs here."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "kernels" / "bench.py"


def test_the_benchmark_walks_through_on_the_cpu_and_writes_what_it_measured(tmp_path):
    file = tmp_path / "bench.json"
    line = [
        sys.executable,
        str(BENCH),
        "--device",
        "cpu",
        "--tiny",
        "--tokens",
        "4,32",
        "--zero-shares",
        "0,.5,1",
    ]
    done = subprocess.run([*line, "--repeats", "2", "--json", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    rows = result["timings"]
    assert result["device"] == "cpu" and result["left_out"] == {"triton": "needs a GPU", "te": "needs a GPU"}
    assert {row["backend"] for row in rows} == {"kernels", "unfused", "grouped_mm"}
    names = {"forward", "dgrad", "wgrad", "fc1", "act", "layer", "layer_backward"}
    assert {row["what"] for row in rows} == names
    assert {row["backend"] for row in rows if row["what"] == "fc1"} == {"kernels", "unfused", "grouped_mm"}
    assert len(rows) == (7 + 1 + 6) * 2 * 3 and all(row["microseconds"] > 0 for row in rows)
    assert {row["rows"] for row in rows if row["zero_share"] == 0} == {8, 64}
    assert {row["rows"] for row in rows if row["zero_share"] == 1} == {0}
    assert len(done.stdout.splitlines()) == 1 + len(rows) + 2
