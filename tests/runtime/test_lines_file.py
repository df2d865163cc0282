"""Lines on disk: what was appended is there after a kill; half a line is not."""

import json
import subprocess
import sys
import time

import pytest

from zeda_megatron.errors import UserError
from zeda_megatron.runtime.lines_file import LinesFile, rewind


def objects(line, where):
    if not isinstance(line, dict):
        raise UserError(f"{where}: no object")
    return line


def test_lines_come_back(tmp_path):
    path = tmp_path / "deep" / "a.jsonl"
    file = LinesFile(path, "--output", objects)
    file.append([{"a": 1}, {"b": "é\u2028\U0001f600"}])
    file.append([{"c": None}])
    assert LinesFile(path, "--output", objects).lines == [{"a": 1}, {"b": "é\u2028\U0001f600"}, {"c": None}]


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
    file = LinesFile(path, "--output", objects)
    file.append([{"text": text} for text in texts])
    written = file.lines
    kept = LinesFile(path, "--output", objects).lines
    assert kept == written
    assert [line["text"] for line in kept[4:]] == texts[4:]
    assert [line["text"] for line in kept[:4]] == ["? half", "?", "\\ud800", "a?b"]


@pytest.mark.parametrize("cut", range(1, 14))
def test_half_a_line_is_dropped_and_the_file_goes_on(tmp_path, cut):
    path = tmp_path / "a.jsonl"
    path.write_bytes((b'{"a": 1}\n' + b'{"second": 2}\n')[: 9 + cut])
    file = LinesFile(path, "--output", objects)
    whole = cut == 14
    assert file.lines == [{"a": 1}, *([{"second": 2}] if whole else [])]
    file.append([{"third": 3}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [*file.lines]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    for text in ('{"a": 1}\n{"b":\n', '{"a": 1}\n[2]\n'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"a.jsonl line 2: "):
            LinesFile(path, "--output", objects)


def test_a_killed_writer_loses_nothing_that_was_appended(tmp_path):
    path = tmp_path / "a.jsonl"
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from zeda_megatron.runtime.lines_file import LinesFile\n"
        "file, n = LinesFile(Path(sys.argv[1]), '--output', lambda line, where: line), 0\n"
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
    kept = [line["n"] for line in LinesFile(path, "--output", objects).lines]
    assert kept == list(range(len(kept))) and len(kept) > max([5, *said])


def test_what_is_kept_of_lines_is_kept_of_new_ones_too(tmp_path):
    path = tmp_path / "a.jsonl"
    LinesFile(path, "--rollout-path", objects, finite=False).append([{"key": "a", "x": float("-inf")}])
    file = LinesFile(path, "--rollout-path", objects, keep=lambda line: line["key"], finite=False)
    file.append([{"key": "b"}])
    assert file.lines == ["a", "b"] and "Infinity" in path.read_text()
    with pytest.raises(UserError, match=r"a\.jsonl line 1: "):
        LinesFile(path, "--rollout-path", objects)


@pytest.mark.parametrize("torn", ["", '{"step": 4', '{"step": 2}'])
def test_rewinding_drops_what_comes_later_and_tells_of_what_cannot_be_read(tmp_path, torn):
    path, told = tmp_path / "metrics.jsonl", []
    path.write_text('{"step": 1}\n{"step": \n{"stop": 2}\n{"step":  2}\n[]\n{"step": 3}\n' + torn)
    rewind(path, lambda line: line["step"] <= 2, told.append)
    whole = torn == '{"step": 2}'  # its end alone is missing
    assert path.read_text() == '{"step": 1}\n{"step":  2}\n' + (torn + "\n") * whole
    assert told == [f"{path} line 2: cannot be read and is dropped (3 such lines in all)"]
    rewind(path, lambda line: line["step"] <= 1, told.append)
    assert path.read_text() == '{"step": 1}\n' and len(told) == 1
    rewind(tmp_path / "none", lambda line: True, told.append)
    assert not (tmp_path / "none").exists()
