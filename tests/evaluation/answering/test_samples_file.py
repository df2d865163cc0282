"""Answers on disk: what was appended is there after a kill; half a line is not."""

import json
import subprocess
import sys
import time

import pytest

from zeda_megatron.errors import UserError
from zeda_megatron.evaluation.answering.samples_file import LinesFile


def objects(line, where):
    if not isinstance(line, dict):
        raise UserError(f"{where}: no object")
    return line


def test_lines_come_back(tmp_path):
    path = tmp_path / "deep" / "a.jsonl"
    file = LinesFile(path, objects)
    file.append([{"a": 1}, {"b": "é\u2028\U0001f600"}])
    file.append([{"c": None}])
    assert LinesFile(path, objects).lines == [{"a": 1}, {"b": "é\u2028\U0001f600"}, {"c": None}]


def test_what_is_written_can_be_read(tmp_path):
    """Nothing that a model, a server or a program says makes a line that the next start refuses."""
    texts = [
        "\ud800 half",
        "\udfff",
        "\\ud800",
        "a\ud83db",
        "," * 4_100_000,
        "[" * 4_100_000,
        "\0\x1b\x85\u2028\r",
        '"{[',
    ]
    path = tmp_path / "a.jsonl"
    file = LinesFile(path, objects)
    file.append([{"text": text} for text in texts])
    written = file.lines
    kept = LinesFile(path, objects).lines
    assert kept == written
    assert [line["text"] for line in kept[4:]] == texts[4:]
    assert [line["text"] for line in kept[:4]] == ["? half", "?", "\\ud800", "a?b"]


@pytest.mark.parametrize("cut", range(1, 14))
def test_half_a_line_is_dropped_and_the_file_goes_on(tmp_path, cut):
    path = tmp_path / "a.jsonl"
    path.write_bytes((b'{"a": 1}\n' + b'{"second": 2}\n')[: 9 + cut])
    file = LinesFile(path, objects)
    whole = cut == 14
    assert file.lines == [{"a": 1}, *([{"second": 2}] if whole else [])]
    file.append([{"third": 3}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [*file.lines]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    for text in ('{"a": 1}\n{"b":\n', '{"a": 1}\n[2]\n'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"a.jsonl line 2: "):
            LinesFile(path, objects)


def test_a_killed_writer_loses_nothing_that_was_appended(tmp_path):
    path = tmp_path / "a.jsonl"
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from zeda_megatron.evaluation.answering.samples_file import LinesFile\n"
        "file, n = LinesFile(Path(sys.argv[1]), lambda line, where: line), 0\n"
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
    kept = [line["n"] for line in LinesFile(path, objects).lines]
    assert kept == list(range(len(kept))) and len(kept) > max([5, *said])
