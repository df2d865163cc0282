"""LiveCodeBench v5 and v6: contest problems, judged on public and private tests.

The data set packs the private ones as base64 of zlib of a pickle of one string, which is JSON. A pickle may run code
when it is loaded; this one is taken apart instead: one string constant and nothing else is accepted.
"""

from __future__ import annotations

import base64
import binascii
import json
import pickletools
import zlib
from typing import Any

from ...data.jsonl import parse_line
from ...data.records import Message
from ...errors import UserError, shown
from .benchmark import Benchmark, Question, Row, Source, Verdict, last_code_block
from .code_tests import judge_called, judge_printed
from .rows import ask, asked, is_authors, numbered, take_name, take_text, take_word

SECONDS = 6.0
"""For one test; the benchmark's own limit."""
_STDIN = (
    "Write a Python program that reads the input from standard input and prints the answer. "
    "Give it, complete, in one fenced code block."
)
_FUNCTION = "Write your solution with this starter code. Give it, complete, in one fenced code block."


def questions(rows: list[Row]) -> list[Question]:
    """The authors' rows, or those of `livecodebench/code_generation_lite`. Tests are unpacked, never unpickled."""
    made = []
    for where, row in numbered(rows, "livecodebench"):
        authors = is_authors(row)
        metadata = _metadata(row.get("metadata") or {}, where)
        public = decode_tests(row.get("public_test_cases"), where)
        private = decode_tests(row.get("private_test_cases"), where)
        reference = {"tests": [{"input": t["input"], "output": t["output"]} for t in public + private]}
        if not reference["tests"]:
            raise UserError(f"{where}: has no tests")
        if metadata.get("func_name"):
            reference["function"] = take_name(metadata, "func_name", where)
            _require_calls(reference["tests"], where)
        uid = take_word(row, "uid" if authors else "question_id", where=where)
        kind = take_text(row, "difficulty", where=where) if row.get("difficulty") else ""
        made.append(Question(uid, asked(row, where) if authors else _asked(row, where), reference, kind))
    return made


def _asked(row: Row, where: str) -> list[Message]:
    text, starter = take_text(row, "question_content", where=where), row.get("starter_code")
    if starter:
        starter = take_text(row, "starter_code", where=where)
        return ask(f"{text}\n\n{_FUNCTION}\n\n```python\n{starter}\n```")
    return ask(f"{text}\n\n{_STDIN}")


def _metadata(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        value = parse_line(value.encode("utf-8", "surrogatepass"), f"{where}: metadata")
    if not isinstance(value, dict):
        raise UserError(f"{where}: metadata must be an object, found {shown(value)}")
    return value


def _require_calls(tests: list[dict[str, str]], where: str) -> None:
    """Arguments and results of functions are JSON: a line each, and one text."""
    for number, test in enumerate(tests, 1):
        for part in (*test["input"].split("\n"), test["output"]):
            parse_line(part.encode("utf-8", "surrogatepass"), f"{where}: test {number}")


def verify(question: Question, answer: str, finish: str | None = None) -> Verdict:
    """All tests passed; the first that fails ends the run."""
    code = last_code_block(answer)
    if not code or not code.strip():
        return Verdict(False, "no code block")
    tests, function = question.reference["tests"], question.reference.get("function")
    if function is None:
        return judge_printed(code, tests, SECONDS)
    called = [
        (
            [json.loads(line) for line in test["input"].split("\n")],
            json.loads(test["output"]),
            len(test["output"]),
        )
        for test in tests
    ]
    return judge_called(code, function, called, SECONDS)


def _version(name: str, title: str, file: str) -> Benchmark:
    source = Source("livecodebench/code_generation_lite", "problems: their contests'; see its page", (file,))
    return Benchmark(name, title, source, questions, verify, samples=8, runs_code=True)


LIVECODEBENCH = (
    _version("livecodebench-v5", "LiveCodeBench v5", "test5.jsonl"),
    _version("livecodebench-v6", "LiveCodeBench v6", "test6.jsonl"),
)


MOST = 1 << 30
"""Bytes that packed tests may have when unpacked."""
_TEXT = ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_HARMLESS = ("PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP")


def decode_tests(packed: str | list | None, where: str) -> list[dict]:
    """Tests as `{"input", "output", "testtype"}`: a list as it is, JSON text, or the packed form.

    Raises `UserError`, opened by `where`, for anything else: more than `MOST` bytes, a pickle that holds more than a
    string, text that is not a list of tests.
    """
    if isinstance(packed, list):
        tests = packed
    elif not packed:
        tests = []
    elif isinstance(packed, str):
        text = packed if packed.lstrip().startswith("[") else pickled_text(_unpacked(packed, where), where)
        tests = parse_line(text.encode("utf-8", "surrogatepass"), f"{where}: private tests")
    else:
        raise UserError(f"{where}: tests must be a list or text, found {shown(packed)}")
    for test in tests if isinstance(tests, list) else [None]:
        if not isinstance(test, dict) or not all(isinstance(test.get(k), str) for k in ("input", "output")):
            raise UserError(f"{where}: private tests are no list of objects with the texts input and output")
    return tests


def _unpacked(packed: str, where: str) -> bytes:
    try:
        stream = zlib.decompressobj()
        data = stream.decompress(base64.b64decode(packed, validate=True), MOST)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise UserError(f"{where}: private tests cannot be unpacked ({error})") from None
    if stream.unconsumed_tail:
        raise UserError(f"{where}: private tests are larger than {MOST >> 20} MiB")
    if not stream.eof:
        raise UserError(f"{where}: private tests are cut short")
    return data


def pickled_text(data: bytes, where: str) -> str:
    """The one string that a pickle holds. Nothing is executed."""
    found: list[str] = []
    try:
        for operation, argument, _ in pickletools.genops(data):
            if operation.name in _TEXT:
                found.append(argument)
            elif operation.name not in _HARMLESS:
                raise UserError(f"{where}: private tests hold the pickle operation {operation.name}; refused")
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: private tests are no pickle of a string ({error})") from None
    if len(found) != 1:
        raise UserError(f"{where}: private tests hold {len(found)} strings; one is expected")
    return found[0]
