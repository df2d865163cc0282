"""AIME, GSM8K and MATH-500: the last box is the answer; math-verify says whether it equals the reference."""

from __future__ import annotations

from ...errors import UserError
from .benchmark import Benchmark, Question, Row, Source, Verdict, last_box
from .rows import ask, asked, is_authors, numbered, take_text, take_word

INSTRUCTION = "Reason step by step and put the final answer in \\boxed{}."
"""Ours; the authors' files bring their own prompts."""


def questions(rows: list[Row]) -> list[Question]:
    """The authors' rows (`label`), or those of the original sets (`problem` or `question`, `answer`)."""
    made = []
    for number, (where, row) in enumerate(numbered(rows, "mathematics"), 1):
        if is_authors(row):
            label = take_word(row, "label", where=where)
            uid = take_word(row, "uid", where=where)
            made.append(Question(uid, asked(row, where), {"label": last_box(label) or label}))
            continue
        text = take_text(row, "problem", "Problem", "question", "Question", where=where)
        # GSM8K ends its worked solution with `#### answer`.
        label = take_word(row, "answer", "Answer", "label", where=where).rpartition("####")[2].strip()
        if not label:
            raise UserError(f"{where}: its answer is empty")
        names = [key for key in ("unique_id", "ID", "id", "problem_idx") if row.get(key) is not None]
        uid = take_word(row, names[0], where=where) if names else str(number)
        made.append(Question(uid, ask(f"{text}\n\n{INSTRUCTION}"), {"label": label}))
    return made


def verify(question: Question, answer: str, finish: str | None = None) -> Verdict:
    """Equal to the reference as numbers, expressions, sets or intervals. To be called from the main thread."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
    from math_verify import verify as equal

    found = last_box(answer)
    if found is None:
        return Verdict(False, "no \\boxed{}")
    ways = [LatexExtractionConfig(), ExprExtractionConfig()]
    gold = parse(f"\\boxed{{{question.reference['label']}}}", ways)
    got = parse(f"\\boxed{{{found}}}", ways)
    right = bool(gold) and bool(got) and equal(gold, got)
    # What neither side can parse still counts when it is the same text.
    right = right or found.replace(" ", "") == str(question.reference["label"]).replace(" ", "")
    return Verdict(right, "" if right else f"answered {found[:60]}")


def _set(name: str, title: str, source: Source, samples: int = 1) -> Benchmark:
    return Benchmark(name, title, source, questions, verify, samples, packages=("math_verify",))


_AIME = "problems: MAA; see the data set's page"
MATHEMATICS = (
    _set("aime-2024", "AIME 2024", Source("HuggingFaceH4/aime_2024", _AIME), 32),
    _set("aime-2025", "AIME 2025", Source("math-ai/aime25", _AIME), 32),
    _set("aime-2026", "AIME 2026", Source("MathArena/aime_2026", _AIME), 32),
    _set("gsm8k", "GSM8K", Source("openai/gsm8k", "MIT", ("main/test-*.parquet",))),
    _set("math-500", "MATH-500", Source("HuggingFaceH4/MATH-500", "MIT (MATH)", ("test.jsonl",))),
)
