"""LiveCodeBench v5 and v6: contest problems, judged on public and private tests."""

from __future__ import annotations

import json

from ...errors import UserError
from .answer_text import last_code_block
from .benchmark import Benchmark, Question, Row, Source, Verdict
from .code_tests import judge_called, judge_printed
from .private_tests import decode_tests
from .rows import ask, is_authors, take

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
    for number, row in enumerate(rows, 1):
        where = f"livecodebench row {number}"
        authors = is_authors(row)
        metadata = _json(row.get("metadata") or {}, where)
        public = decode_tests(row.get("public_test_cases"), where)
        private = decode_tests(row.get("private_test_cases"), where)
        reference = {"tests": [{"input": t["input"], "output": t["output"]} for t in public + private]}
        if not reference["tests"]:
            raise UserError(f"{where}: has no tests")
        if metadata.get("func_name"):
            reference["function"] = metadata["func_name"]
        uid = str(row["uid"] if authors else take(row, "question_id", where=where))
        made.append(Question(uid, row["prompt"] if authors else _asked(row, where), reference, _kind(row)))
    return made


def _asked(row: Row, where: str) -> list[dict[str, str]]:
    text, starter = take(row, "question_content", where=where), row.get("starter_code")
    if starter:
        return ask(f"{text}\n\n{_FUNCTION}\n\n```python\n{starter}\n```")
    return ask(f"{text}\n\n{_STDIN}")


def _kind(row: Row) -> str:
    return str(row.get("difficulty") or "")


def _json(value, where: str) -> dict:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: metadata is not valid JSON ({error.msg})") from None
    return value


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
