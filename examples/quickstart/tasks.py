"""Checkable tasks of the quickstart: small settings of reasoning-gym generators.

The families are chosen so that a transformer of a few million parameters can learn them: the answer follows
from the question by copying, looking up, sorting or comparing. Questions and answers are the generators' own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import reasoning_gym

FAMILIES: dict[str, dict[str, Any]] = {
    "word_sequence_reversal": {"min_words": 3, "max_words": 5},
    "number_filtering": {
        "min_numbers": 3,
        "max_numbers": 4,
        "min_decimals": 0,
        "max_decimals": 0,
        "min_value": 0,
        "max_value": 99,
    },
    "needle_haystack": {"min_num_statements": 3, "max_num_statements": 5},
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
    "rotate_matrix": {"min_n": 2, "max_n": 3, "min_rotations": 0, "max_rotations": 3},
    "family_relationships": {"min_family_size": 3, "max_family_size": 4},
}

_CHUNK = 2_000
# A family whose questions have run out gives only repeats; this many chunks without enough news end it.
_MAX_CHUNKS = 40


@dataclass(frozen=True)
class Task:
    """One question with its only accepted answer."""

    family: str
    """Name of the reasoning-gym generator; the `kind` of the sample."""
    question: str
    """The generator's own text."""
    answer: str
    """The exact string that counts as right (after stripping)."""


def generate(family: str, seed: int, seen: set[str]) -> Iterator[Task]:
    """Yield tasks of `family` whose question is not in `seen`, adding each question to it.

    Ends when the generator gives hardly anything new. The order depends on `seed` and on `seen` alone.
    """
    for chunk in range(_MAX_CHUNKS):
        # Entry i of a generator is drawn from its seed + i, so chunks lie a whole chunk apart.
        entries = reasoning_gym.create_dataset(
            family, size=_CHUNK, seed=seed * 1_000_000 + chunk * _CHUNK, **FAMILIES[family]
        )
        fresh = 0
        for entry in entries:
            question, answer = entry["question"].strip(), entry["answer"]
            if answer is None or question in seen:
                continue
            seen.add(question)
            fresh += 1
            yield Task(family, question, answer)
        if fresh < _CHUNK // 100:
            return


def is_correct(response: str, label: str) -> bool:
    """Exact match after stripping; every family above has one right string."""
    return response.strip() == label.strip()
