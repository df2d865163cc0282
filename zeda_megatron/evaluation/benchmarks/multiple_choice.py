"""GPQA-Diamond and MMLU-Redux, the paper's out-of-domain sets: the last box holds a letter."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable

from ...errors import UserError
from .answer_text import last_box
from .benchmark import Benchmark, Question, Row, Source, Verdict
from .rows import ask, is_authors, take

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


def _questions(rows: list[Row], original: Callable[[Row, int], Question | None]) -> list[Question]:
    """`original` reads a row that is not the authors'; None leaves it out."""
    numbered = enumerate(rows, 1)
    made = (_authors(row, number) if is_authors(row) else original(row, number) for number, row in numbered)
    return [question for question in made if question is not None]


def _gpqa(row: Row, number: int) -> Question:
    where = f"row {number}"
    text = take(row, "Question", where=where).strip()
    names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    choices = [str(take(row, name, where=where)).strip() for name in names]
    order = list(range(len(choices)))
    random.Random(hashlib.sha256(text.encode()).hexdigest()).shuffle(order)
    uid = str(row.get("Record ID") or number)
    return _question(uid, text, [choices[i] for i in order], order.index(0), "")


def _redux(row: Row, number: int) -> Question | None:
    where = f"row {number}"
    if row.get("error_type", "ok") != "ok":
        return None
    right, choices = int(take(row, "answer", where=where)), list(take(row, "choices", where=where))
    if not 0 <= right < len(choices):
        raise UserError(f"{where}: answer {right} is none of the {len(choices)} choices")
    text, subject = take(row, "question", where=where).strip(), str(row.get("subject") or "")
    return _question(str(row.get("id") or number), text, list(map(str, choices)), right, subject)


def _authors(row: Row, number: int) -> Question:
    label = str(take(row, "label", where=f"row {number}"))
    return Question(str(row["uid"]), row["prompt"], {"label": (last_box(label) or label).strip()})


def _question(uid: str, text: str, choices: list[str], right: int, kind: str) -> Question:
    lines = "\n".join(f"{letter}) {choice}" for letter, choice in zip(LETTERS, choices))
    return Question(uid, ask(f"{text}\n\n{lines}\n\n{INSTRUCTION}"), {"label": LETTERS[right]}, kind)


_GPQA = Source("Idavidrein/gpqa", "CC BY 4.0, gated: accept its terms first", ("gpqa_diamond.csv",))
_REDUX = Source("edinburgh-dawg/mmlu-redux-2.0", "CC BY 4.0", ("**/*.parquet", "**/*.arrow", "**/*.json*"))
MULTIPLE_CHOICE = (
    Benchmark("gpqa-diamond", "GPQA-Diamond", _GPQA, gpqa_questions, verify, 8, 32_768),
    Benchmark("mmlu-redux-2.0", "MMLU-Redux", _REDUX, redux_questions, verify, 1, 32_768),
)
