"""Rows and files of benchmarks as they should not be: one line names file and line, before anything is asked."""

import base64
import gzip
import json
import os
import pickle
import zlib
from functools import partial

import pyarrow
import pyarrow.parquet
import pytest

from zeda_megatron.errors import UserError
from zeda_megatron.evaluation.benchmarks.registry import BENCHMARKS
from zeda_megatron.evaluation.benchmarks.rows import read_rows

ASKED = [{"role": "user", "content": "How many?"}]
TESTS = [{"input": "1 2\n", "output": "3\n"}]
MATH = {"problem": "1 + 1", "answer": "2", "id": "a"}
AUTHORS = {"uid": "a", "prompt": ASKED, "label": "\\boxed{2}"}
REDUX = {"question": "Which?", "choices": ["a", "b", "c"], "answer": 1, "subject": "law"}
GPQA = {"Question": "Which?", "Correct Answer": "a", "Incorrect Answer 1": "b", "Incorrect Answer 2": "c"}
GPQA |= {"Incorrect Answer 3": "d", "Record ID": "r"}
TASK = {"messages": ASKED, "label": "2", "kind": "sum", "uid": "a"}
STDIN = {"question_content": "Add.", "question_id": "q", "public_test_cases": TESTS, "metadata": "{}"}
STDIN |= {"private_test_cases": json.dumps(TESTS), "difficulty": "easy", "starter_code": ""}
CALLED = {**STDIN, "metadata": '{"func_name": "add"}', "starter_code": "class Solution: ..."}
CALLED |= {"public_test_cases": [{"input": "1\n2", "output": "3"}], "private_test_cases": []}
CODE = {"task_id": "HumanEval/0", "prompt": "def f(x):\n", "entry_point": "f", "test": "def check(f): ..."}
PLUS = {**CODE, "canonical_solution": "    return x", "base_input": [[1]], "plus_input": [[2]], "atol": 0}
MBPP = {"task_id": 2, "prompt": "Do.", "test": "assert f(1)", "test_list": ["assert f(1)"]}
FOLLOW = {"prompt": "No commas.", "key": 1, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}

NESTED = json.loads("[" * 500 + "]" * 500)
NO_TEXT = [None, True, [], {}, ["x"], "", " \n"]
NO_WORD = [*NO_TEXT, float("nan"), float("inf")]
NO_MESSAGES = [
    5, "x", {}, [], [5], ["x"], [[]], [{}], [{"role": "user"}], [{"role": 5, "content": "x"}], [{"content": "x"}],
    [{"role": "user", "content": None}], [{"role": "user", "content": ["x"]}], [{"role": "user", "content": " "}],
    [{"role": "<|im_start|>", "content": "x"}], [{"role": "user", "content": "x", "tool_calls": [1]}], NESTED,
]  # fmt: skip
NO_TESTS = [
    5, True, {}, "x", "[", "[1]", "{}", "[{}]", '["x"]', "[" * 100_000, [1], [{}], [{"input": "1"}],
    [{"input": 1, "output": "1"}], [{"input": "1", "output": None}], [{"input": ["1"], "output": "1"}],
    base64.b64encode(b"x").decode(), base64.b64encode(zlib.compress(b"x")).decode(),
    base64.b64encode(zlib.compress(pickle.dumps("[1]"))).decode(),
    base64.b64encode(zlib.compress(pickle.dumps(os.getcwd))).decode(),
    base64.b64encode(zlib.compress(pickle.dumps('[{"input": "\\ud800"'))).decode(),
    base64.b64encode(zlib.compress(pickle.dumps("[" * 100_000))).decode(),
]  # fmt: skip
NO_CALLS = [
    [{"input": x, "output": y}] for x, y in (("x", "1"), ("", "1"), ("1\n", "1"), ("1", "x"), ("1", ""))
]
NO_CALLS += [
    [{"input": "1", "output": text}] for text in ("9" * 5000, "[" * 100_000, '"\\ud800"', '{"a":1,"a":2}')
]

WRONG = [
    ("gsm8k", MATH, {"problem": NO_TEXT, "answer": [*NO_WORD, "#### ", "work ####"], "id": [[], {}, True, ["a"]]}),
    ("math-500", AUTHORS, {"label": NO_WORD, "prompt": NO_MESSAGES[3:], "uid": [[], {}, True, ["a"]]}),
    ("mmlu-redux-2.0", REDUX, {
        "question": NO_TEXT, "choices": [None, 5, "abc", {}, [], [1, None], ["a", ["b"]], ["x"] * 11],
        "answer": [*NO_WORD, "B", -1, 3, 1.5, "1.0", 10**12, "+1", "\u0661"], "subject": [5, ["x"], {"a": 1}],
    }),
    ("mmlu-redux-2.0", AUTHORS, {"label": NO_WORD, "prompt": NO_MESSAGES[3:]}),
    ("gpqa-diamond", GPQA, {"Question": NO_TEXT, "Correct Answer": NO_WORD, "Incorrect Answer 3": NO_WORD}),
    ("tasks", TASK, {"messages": [None, *NO_MESSAGES], "label": NO_WORD[1:], "kind": [5, ["x"], {"a": 1}]}),
    ("livecodebench-v6", STDIN, {
        "question_content": NO_TEXT, "question_id": NO_WORD, "public_test_cases": NO_TESTS,
        "private_test_cases": NO_TESTS, "metadata": [5, True, [1], "[1]", "{", "5", "[" * 100_000, '"x"'],
        "difficulty": [5, ["x"]], "starter_code": [5, ["x"]],
    }),
    ("livecodebench-v5", CALLED, {
        "public_test_cases": NO_CALLS,
        "metadata": [{"func_name": x} for x in (5, ["f"], {"a": 1}, "f(x)", "a.b", "1", "f\n", True)],
    }),
    ("humaneval", CODE, {
        "task_id": NO_WORD, "prompt": NO_TEXT, "test": NO_TEXT, "entry_point": [*NO_TEXT, "f(x)", "os.system", "f;g"],
    }),
    ("humanevalplus", PLUS, {
        "entry_point": NO_TEXT, "canonical_solution": NO_TEXT, "base_input": [None, 5, "x", {}, [1], ["x"], [None]],
        "plus_input": [None, 5, "x", {}, [1], [{}]], "atol": ["x", -1, [1], True, float("inf"), float("nan")],
    }),
    ("humanevalplus", {**PLUS, "uid": "u", "prompt": ASKED}, {"prompt": NO_MESSAGES[3:]}),
    ("mbppplus", MBPP, {"task_id": NO_WORD, "prompt": NO_TEXT, "test": NO_TEXT, "test_list": [5, "x", {"a": 1}, [5]]}),
    ("ifeval", FOLLOW, {
        "prompt": NO_TEXT[:4] + NO_TEXT[5:], "key": NO_WORD,
        "instruction_id_list": [None, 5, "x", {}, [], [5], [None], ["a:b", "c:d"]],
        "kwargs": [None, 5, "x", {}, [], [5], ["x"], [[]], [{}, {}]],
    }),
]  # fmt: skip
"""A benchmark, a row that is right, and for its keys what is wrong."""

RAW = {
    "not JSON": b"x\n",
    "CSV": b"question,answer\na,1\n",
    "a list": b"[1]\n",
    "null": b"null\n",
    "nested": b"[" * 100_000 + b"\n",
    "nested in a key": b'{"question": ' + b"[" * 5000 + b"]" * 5000 + b"}\n",
    "half a character": b'{"question": "a", "answer": "\\ud83d"}\n',
    "a long number": b'{"question": "a", "answer": ' + b"7" * 5000 + b"}\n",
    "a key twice": b'{"question": "a", "question": "b", "answer": "1"}\n',
    "UTF-16": '{"question": "a", "answer": "1"}\n'.encode("utf-16"),
    "Latin-1": '{"question": "\xe4", "answer": "1"}\n'.encode("latin-1"),
    "zeros": b"\0" * 4096,
    "empty": b"",
    "blank": b"\n\n  \n",
    "half a gzip": gzip.compress(os.urandom(5000))[:2000],
    "a gzip of no text": gzip.compress(os.urandom(5000)),
    "a damaged gzip": b"\x1f\x8b\x08\0" + b"x" * 100,
    "zip": b"PK\x03\x04" + b"\0" * 100,
    "parquet that ends": b"PAR1" + b"\0" * 100 + b"PAR1",
    "a quotation that never ends": b'question,answer\n"' + b"a,1\n" * 100_000,
    "many fields": b"question,answer\na,1,2,3\n",
    "a million lists": b"[" + b"[]," * 5_000_000 + b"1]\n",
}
ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet", ".arrow")
FINE = {("CSV", ".csv")}
PLACES = {
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a device": partial(os.symlink, "/dev/zero"),
    "a link to nowhere": partial(os.symlink, "nowhere/at/all"),
    "a link in a circle": lambda path: os.symlink(path, path),
}


def cases():
    for name, right, keys in WRONG:
        for key, values in keys.items():
            for value in values:
                row = json.dumps({**right, key: value}).encode() + b"\n"
                good = json.dumps(
                    right | {"id": "other", "uid": "other"} if "uid" in right else right
                ).encode()
                yield f"{name} {key} {str(value)[:40]!r}", f"{name}.jsonl", good + b"\n" + row, "line 2"
    for ending in ENDINGS:
        for what, data in RAW.items():
            if (what, ending) not in FINE:
                yield f"gsm8k{ending}: {what}", f"gsm8k{ending}", data, ""


CASES = {name: case for name, *case in cases()}


def questions(file):
    benchmark = BENCHMARKS[next(file.name.removesuffix(end) for end in ENDINGS if file.name.endswith(end))]
    made = benchmark.questions(read_rows(benchmark, str(file.parent)))
    if not made:  # as `registry.load` says
        raise UserError(f"{file}: its data hold no questions")
    return made


def refusal(file, where: str) -> str | None:
    """What went wrong; None: it was refused as it should be."""
    try:
        questions(file)
    except UserError as error:
        said = str(error)
        right = file.name in said and where in said and "\n" not in said and len(said) <= 1000
        return None if right else f"said {said[:200]}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    return "accepted"


def misses(names, folder) -> list[str]:
    found = []
    for number, name in enumerate(names):
        file, data, where = CASES[name]
        path = folder / str(number) / file
        path.parent.mkdir()
        path.write_bytes(data)
        wrong = refusal(path, f"{path} {where}" if where else "")
        path.unlink()
        found += [f"{name}: {wrong}"] if wrong else []
    return found


def test_rows_that_are_right_are_read(tmp_path):
    for number, (name, right, _) in enumerate(WRONG):
        file = tmp_path / str(number) / f"{name}.jsonl"
        file.parent.mkdir()
        file.write_text(json.dumps(right) + "\n")
        assert len(questions(file)) == 1, name


def test_rows_and_files_that_are_wrong_are_named(tmp_path):
    assert len(CASES) > 350
    assert misses(CASES, tmp_path) == []


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("what", PLACES)
def test_what_is_no_file_is_never_opened(tmp_path, ending, what):
    PLACES[what](tmp_path / f"gsm8k{ending}")
    with pytest.raises(
        UserError, match=rf"gsm8k\{ending}: (is|no such file|cannot be read)|gsm8k: no questions"
    ):
        questions(tmp_path / f"gsm8k{ending}")


def test_a_file_that_grows_when_it_is_unpacked_is_bounded(tmp_path, monkeypatch):
    from zeda_megatron.evaluation.benchmarks import rows

    monkeypatch.setattr(rows, "_MOST", 1 << 20)
    monkeypatch.setattr(rows, "_MOST_ROWS", 1000)
    bombs = tmp_path / "gsm8k.jsonl.gz"
    bombs.write_bytes(gzip.compress(b'{"question": "' + b"a" * (50 << 20)))
    assert refusal(bombs, "line 1: is longer than") is None
    bombs.unlink()
    many = pyarrow.table({"question": ["a"] * 100_000, "answer": ["1"] * 100_000})
    pyarrow.parquet.write_table(many, tmp_path / "gsm8k.parquet")
    assert refusal(tmp_path / "gsm8k.parquet", "has 100000 rows") is None
