"""Questions with answers that a program can check: reasoning-gym's families, and files with one right answer each."""

from __future__ import annotations

import inspect
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...strict_json import read_json
from .benchmark import Benchmark, Question, Row, Source, Verdict, after_thinking
from .code_tests import judge_evaluated
from .rows import ask, asked, numbered, take_list, take_text, take_word

GYM = "reasoning_gym"
_PACKAGE = "reasoning-gym==0.1.25"
_EVALUATES = re.compile(r"\b(eval|exec|parse_expr|sympify|S|lambdify)\(")
_SECONDS = 20.0
"""For one answer in the sandbox, imports included."""


TEXT_KINDS = ("prose", "code")
"""Kinds of conversations that are free text: nothing in them is right or wrong."""


def exactly(answer: str, label: Any) -> bool:
    """The one right string, space around it aside."""
    return answer.strip() == str(label).strip()


def task_questions(rows: list[Row]) -> list[Question]:
    """Rows `{"messages": [..., answer], "label", "kind"}`, such as the quickstart's held-out file; free texts and those
    without a label are left out."""
    made = []
    for number, (where, row) in enumerate(numbered(rows, "tasks"), 1):
        kind = take_text(row, "kind", where=where) if row.get("kind") else ""
        if row.get("label") is None or kind in TEXT_KINDS:
            continue
        messages = take_list(row, "messages", where)
        if isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
            messages = messages[:-1]
        reference = {"label": take_word(row, "label", where=where)}
        uid = take_word(row, "uid", where=where) if row.get("uid") else str(number)
        made.append(Question(uid, asked({"prompt": messages}, where), reference, kind))
    return made


def verify_task(question: Question, answer: str, finish: str | None = None) -> Verdict:
    """The exact string, after the thinking if there is any."""
    text = after_thinking(answer)
    right = exactly(text, question.reference["label"])
    return Verdict(right, "" if right else f"answered {text[:60]}")


def gym_benchmark(name: str, settings: dict[str, dict] | None = None) -> Benchmark:
    """`reasoning_gym:FAMILY`: seeded questions and the family's own verifier.

    Some families evaluate an answer as Python or hand it to sympy, which does; those verify in the sandbox.

    Args:
        settings: arguments of the generators by family (`--family-settings`); the generator's defaults otherwise.
    """
    family = name.partition(":")[2]
    if not family:
        raise UserError(f"--benchmarks {name}: name a family, such as {GYM}:chain_sum")
    arguments = (settings or {}).get(family, {})
    made_sets: dict[tuple[int, int], Any] = {}

    def dataset(number: int, seed: int):
        if (number, seed) not in made_sets:
            made_sets[number, seed] = _dataset(family, number, seed, arguments)
        return made_sets[number, seed]

    def generate(number: int, seed: int) -> list[Question]:
        made = []
        for index, entry in enumerate(dataset(number, seed)):
            reference = {"index": index, "size": number, "seed": seed}
            made.append(
                Question(f"{family}-{seed}-{index}", ask(entry["question"].strip()), reference, family)
            )
        return made

    def verify(question: Question, answer: str, finish: str | None = None) -> Verdict:
        from reasoning_gym.utils import extract_answer

        where, text = question.reference, after_thinking(answer)
        tagged = extract_answer(text)
        text = text if tagged is None else tagged
        if sandboxed:
            order = {"kind": "gym", "family": family, "arguments": arguments, "answer": text, **where}
            return judge_evaluated(order, _SECONDS)
        data = dataset(where["size"], where["seed"])
        score = data.score_answer(text, data[where["index"]])
        return Verdict(score >= 1.0, "" if score >= 1.0 else f"score {score:.2f}")

    sandboxed = evaluates_answers(family)
    return Benchmark(
        name,
        f"reasoning-gym {family}",
        Source(_PACKAGE, "Apache-2.0", package=_PACKAGE),
        task_questions,
        verify,
        packages=(GYM,),
        runs_code=sandboxed,
        generate=generate,
    )


def evaluates_answers(family: str) -> bool:
    """Whether the family's module can run what it is given: `eval`, `exec`, or sympy's parsers, which evaluate."""
    if find_spec(GYM) is None:
        return False  # `registry.load` will say so
    from reasoning_gym.factory import DATASETS

    if family not in DATASETS:
        return False  # making the questions will say so
    source = inspect.getsource(inspect.getmodule(DATASETS[family][0]))
    return _EVALUATES.search(source) is not None


def _dataset(family: str, size: int, seed: int, arguments: dict):
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(family, size=size, seed=seed, **arguments)
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"{GYM}:{family}: {str(error) or 'its settings are refused'}") from None


def read_settings(file: str | None) -> dict[str, dict]:
    """`--family-settings FILE`: a JSON object, family to arguments of its generator."""
    if file is None:
        return {}
    try:
        settings = read_json(Path(file))
    except UserError as error:
        raise UserError(f"--family-settings {error}") from None
    if not all(isinstance(v, dict) for v in settings.values()):
        raise UserError(f"--family-settings {file}: expected an object, family to its settings")
    return settings


TASKS = Benchmark(
    "tasks", "tasks with one right answer", Source("a file of yours", "yours"), task_questions, verify_task
)
