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
    assert len(rows) == (7 + 1 + 6) * 2 * 3
    assert all(row["device_us"] > 0 and row["host_us"] > 0 and row["how"] == "cpu" for row in rows)
    assert {row["rows"] for row in rows if row["zero_share"] == 0} == {8, 64}
    assert {row["rows"] for row in rows if row["zero_share"] == 1} == {0}
    assert len(done.stdout.splitlines()) == 1 + len(rows) + 2


def test_the_crossover_of_the_tiles_is_found_and_kept_off_the_file_without_a_gpu(tmp_path):
    sys.path.insert(0, str(BENCH.parent))
    import bench

    assert bench.crossover({32: (1, 2), 64: (2, 3), 96: (3, 3), 128: (5, 4)}) == 96
    assert bench.crossover({32: (1, 2), 64: (3, 2), 96: (3, 4), 128: (5, 4)}) == 128  # one that is late again
    assert bench.crossover({32: (1, 2), 64: (1, 2)}) == 65 and bench.crossover({32: (2, 1)}) == 32
    kept = bench.TILES.read_bytes()
    line = [sys.executable, str(BENCH), "--device", "cpu", "--tiny", "--tiles", "--repeats", "1"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0 and "the large tile from" in done.stdout and bench.TILES.read_bytes() == kept


def test_one_backend_is_measured_alone_and_an_unknown_one_is_named():
    line = [sys.executable, str(BENCH), "--device", "cpu", "--tiny", "--tokens", "4", "--zero-shares", "0"]
    done = subprocess.run([*line, "--backends", "unfused"], capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2
    done = subprocess.run([*line, "--backends", "fast"], capture_output=True, text=True)
    assert done.returncode == 2 and "'fast' is unknown; choose among kernels," in done.stderr


def test_the_host_s_time_is_measured_without_a_gpu():
    line = [sys.executable, str(BENCH.with_name("bench_host.py")), "--experts", "3"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [part.split()[-1] for part in done.stdout.splitlines()] == ["us"] * 4
