"""Answers on disk: what was appended is there after a kill; half a line is not."""

import json
import subprocess
import sys
import time

import pytest

from zeda_megatron.errors import UserError
from zeda_megatron.evaluation.answering.samples_file import LinesFile


def test_lines_come_back(tmp_path):
    with LinesFile(tmp_path / "deep" / "a.jsonl") as file:
        file.append([{"a": 1}, {"b": "é\ud800"}])
        file.append([{"c": None}])
    assert LinesFile(tmp_path / "deep" / "a.jsonl").lines == [{"a": 1}, {"b": "é\ud800"}, {"c": None}]


@pytest.mark.parametrize("cut", range(1, 14))
def test_half_a_line_is_dropped_and_the_file_goes_on(tmp_path, cut):
    path = tmp_path / "a.jsonl"
    path.write_bytes((b'{"a": 1}\n' + b'{"second": 2}\n')[: 9 + cut])
    with LinesFile(path) as file:
        whole = cut == 14
        assert file.lines == [{"a": 1}, *([{"second": 2}] if whole else [])]
        file.append([{"third": 3}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [*file.lines]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    for text in ('{"a": 1}\n{"b":\n', '{"a": 1}\n[2]\n'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"a.jsonl line 2: "):
            LinesFile(path)


def test_a_killed_writer_loses_nothing_that_was_appended(tmp_path):
    path = tmp_path / "a.jsonl"
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from zeda_megatron.evaluation.answering.samples_file import LinesFile\n"
        "file, n = LinesFile(Path(sys.argv[1])), 0\n"
        "while True:\n    file.append([{'n': n, 'x': 'x' * 1000}])\n    print(n, flush=True)\n    n += 1\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    for line in writer.stdout:
        if int(line) >= 5:
            break
    writer.kill()
    said = [int(line) for line in writer.stdout.read().split()]
    writer.wait()
    time.sleep(0.01)
    kept = [line["n"] for line in LinesFile(path).lines]
    assert kept == list(range(len(kept))) and len(kept) > max([5, *said])
