"""Files that nobody has checked: read as they are, or refused in one line, in bounded time and memory."""

import os
import tracemalloc

import pytest

from zeda_megatron.errors import UserError, one_line
from zeda_megatron.regular_file import is_regular, open_regular, read_regular
from zeda_megatron.strict_json import is_number, read_json, strict_loads


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 50_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "5000 digits"),
        (b'{"a": "\\ud800"}', "half a character"),
        (b'{"\\uDC00": 1}', "half a character"),
        (b'{"a": [{"b": "x\\ud83dy"}]}', "half a character"),
        (b'{"a": NaN}', "a is not a finite number"),
        (b'{"a": [1, 1e999]}', "a is not a finite number"),
        (b'{"a": 1, "a": 2}', "'a' comes twice"),
        (b'{"a": "\xff"}', "utf-8"),
        (b"", "Expecting value"),
    ],
)
def test_json_that_is_more_than_json_is_refused_with_the_reason(text, words):
    with pytest.raises(ValueError, match=words):
        strict_loads(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'{"a": "\\ud83d\\ude00 \\\\ud800"}', {"a": "\U0001f600 \\ud800"}),
        (
            b'{"model_max_length": 1000000000000000019884624838656}',
            {"model_max_length": 10**30 + 19884624838656},
        ),
        (b"[" * 200 + b"]" * 200, None),
    ],
)
def test_odd_but_valid_json_is_read(text, value):
    assert value is None or strict_loads(text) == value
    strict_loads(text)


def test_a_text_of_endless_small_parts_is_refused_before_it_fills_the_memory():
    text = b"[" + b"[]," * 30_000_000 + b"[]]"
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than any such file"):
        strict_loads(text)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, kind in (("pipe", "a pipe"), ("folder", "a folder"), ("/dev/zero", "a device")):
        for use in (open_regular, read_regular, is_regular, read_json):
            with pytest.raises(UserError, match=f"is {kind}, where a regular file belongs"):
                use(tmp_path / name)
    assert not is_regular(tmp_path / "nothing") and not is_regular(tmp_path / "nothing" / "below")
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "nothing")
    with pytest.raises(UserError, match="file is missing"):
        read_json(tmp_path / "nothing")
    with pytest.raises(UserError, match="no name of a file"):
        read_regular("a\0b")


def test_no_more_than_the_limit_is_read(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 11)
    assert read_regular(tmp_path / "file", 11) == b"x" * 11
    with pytest.raises(UserError, match="longer than 10 bytes"):
        read_regular(tmp_path / "file", 10)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(UserError, match="longer than"):
        read_regular(tmp_path / "sparse", 1000)


def test_a_message_is_one_line_whatever_it_repeats():
    said = str(UserError("a\nb\tc\u2028d\x1b[31m\ud800 é 日本"))
    assert said == r"a b\tc\u2028d\x1b[31m\ud800 é 日本"
    long = one_line("x" * 10_000 + "end")
    assert len(long) < 1600 and long.endswith("end")


def test_a_number_beyond_the_largest_float_is_no_finite_number():
    assert not is_number(10**400) and not is_number(True) and is_number(10**300) and is_number(0.5)
