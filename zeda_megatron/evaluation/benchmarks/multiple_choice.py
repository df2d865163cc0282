"""GPQA-Diamond and MMLU-Redux, the paper's out-of-domain sets: the last box holds a letter."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable

from ...errors import UserError, cut_short, shown
from ...strict_json import is_number
from .benchmark import Benchmark, Question, Row, Source, Verdict, last_box
from .rows import ask, asked, is_authors, numbered, take_list, take_text, take_word

LETTERS = "ABCDEFGHIJ"
INSTRUCTION = "Reason step by step and put the letter of the right choice in \\boxed{}."
"""Ours; the authors' files bring their own prompts."""
_FONT = re.compile(
    r"\\(?:(?:text|math)(?:rm|bf|it|sf|tt|normal|up|md)?|mbox|operatorname|boldsymbol|bm|bf|rm|it|sf|tt|left|right|bfseries)"
    r"(?![A-Za-z])|[{}$*`]"
)
"""LaTeX and Markdown that change how a letter looks."""
_SPACE = re.compile(r"\\(?:[ ,;:!]|q?quad(?![A-Za-z]))|~")
_LETTER = re.compile(
    r"(?:(?:the\s+)?(?:(?:final|correct|right)\s+)?(?:answer|option|choice)\b(?:\s+is\b)?\s*:?\s*)*"
    r"[(\[]?([A-J])(?:[)\].:]*$|[)\]][.:]?(?=\s|$)|[.:](?=\s)|\s+[-\u2013\u2014](?=\s))",
    re.IGNORECASE,
)
"""A letter alone, or with a delimiter and the text of its choice behind it."""
_SECOND = re.compile(r"\s*(?:[,;&/+]|and\b|or\b|[(\[]?[A-Ja-j][)\].:,;&])")
"""Behind the delimiter: one more letter is chosen."""


def gpqa_questions(rows: list[Row]) -> list[Question]:
    """The authors' rows, or those of `Idavidrein/gpqa`. The order of the choices is drawn from the question's text."""
    return _questions(rows, _gpqa)


def redux_questions(rows: list[Row]) -> list[Question]:
    """The authors' rows, or those of `mmlu-redux-2.0` that its reviewers found in order (`error_type` ok)."""
    return _questions(rows, _redux)


def verify(question: Question, answer: str, finish: str | None = None) -> Verdict:
    """The boxed letter, or the boxed text of the right choice where the reference is no letter."""
    found = last_box(answer)
    if found is None:
        return Verdict(False, "no \\boxed{}")
    label = question.reference["label"]
    if len(label) == 1 and label.upper() in LETTERS:
        right = letter_of(found) == label.upper()
    else:
        right = _plain(found).casefold() == _plain(label).casefold()
    return Verdict(right, "" if right else f"answered {found[:60]}")


def letter_of(box: str) -> str | None:
    """The one letter that a box chooses; None for a sentence that begins with one, and for two letters."""
    text = _plain(box)
    match = _LETTER.match(text)
    if match is None or _SECOND.match(text, match.end()):
        return None
    return match[1].upper()


def _plain(text: str) -> str:
    return " ".join(_SPACE.sub(" ", _FONT.sub("", text)).split())


def _questions(rows: list[Row], original: Callable[[Row, int, str], Question | None]) -> list[Question]:
    """`original` reads a row that is not the authors'; None leaves it out."""
    made = (
        _authors(row, where) if is_authors(row) else original(row, number, where)
        for number, (where, row) in enumerate(numbered(rows, "multiple choice"), 1)
    )
    return [question for question in made if question is not None]


def _gpqa(row: Row, number: int, where: str) -> Question:
    text = take_text(row, "Question", where=where).strip()
    names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    choices = [take_word(row, name, where=where).strip() for name in names]
    order = list(range(len(choices)))
    random.Random(hashlib.sha256(text.encode()).hexdigest()).shuffle(order)
    uid = take_word(row, "Record ID", where=where) if row.get("Record ID") else str(number)
    return _question(uid, text, [choices[i] for i in order], order.index(0), "")


def _redux(row: Row, number: int, where: str) -> Question | None:
    if row.get("error_type", "ok") != "ok":
        return None
    text, choices = take_text(row, "question", where=where).strip(), take_list(row, "choices", where)
    if len(choices) > len(LETTERS) or not all(isinstance(one, str) or is_number(one) for one in choices):
        raise UserError(f"{where}: choices must be at most {len(LETTERS)} texts, found {shown(choices)}")
    right = take_word(row, "answer", where=where)
    if right not in map(str, range(len(choices))):
        raise UserError(f"{where}: answer {cut_short(right)} is none of the {len(choices)} choices")
    subject = take_text(row, "subject", where=where) if row.get("subject") else ""
    uid = take_word(row, "id", where=where) if row.get("id") else str(number)
    return _question(uid, text, list(map(str, choices)), int(right), subject)


def _authors(row: Row, where: str) -> Question:
    label = take_word(row, "label", where=where)
    uid = take_word(row, "uid", where=where)
    return Question(uid, asked(row, where), {"label": (last_box(label) or label).strip()})


def _question(uid: str, text: str, choices: list[str], right: int, kind: str) -> Question:
    lines = "\n".join(f"{letter}) {choice}" for letter, choice in zip(LETTERS, choices))
    return Question(uid, ask(f"{text}\n\n{lines}\n\n{INSTRUCTION}"), {"label": LETTERS[right]}, kind)


_GPQA = Source("Idavidrein/gpqa", "CC BY 4.0, gated: accept its terms first", ("gpqa_diamond.csv",))
_REDUX = Source("edinburgh-dawg/mmlu-redux-2.0", "CC BY 4.0", ("**/*.parquet", "**/*.arrow", "**/*.json*"))
MULTIPLE_CHOICE = (
    Benchmark("gpqa-diamond", "GPQA-Diamond", _GPQA, gpqa_questions, verify, 8, 32_768),
    Benchmark("mmlu-redux-2.0", "MMLU-Redux", _REDUX, redux_questions, verify, 1, 32_768),
)
