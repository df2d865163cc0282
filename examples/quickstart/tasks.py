"""Checkable tasks of the quickstart: small settings of reasoning-gym generators.

The families are chosen so that a transformer of a few million parameters can learn them: the answer follows
from the question by copying, looking up, sorting or comparing. Questions and answers are the generators' own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reasoning_gym

FAMILIES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("families.json").read_text())
"""Generator to its settings; `evaluation run --family-settings` reads the same file."""

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


def chunk_of(family: str, seed: int, chunk: int, seen: set[str]) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Yield the tasks of one chunk whose question is not in `seen`, adding each question to it, and what the generator
    says about them."""
    # Entry i of a generator is drawn from its seed + i, so chunks lie a whole chunk apart.
    entries = reasoning_gym.create_dataset(
        family, size=_CHUNK, seed=seed * 1_000_000 + chunk * _CHUNK, **FAMILIES[family]
    )
    for entry in entries:
        question, answer = entry["question"].strip(), entry["answer"]
        if answer is not None and question not in seen:
            seen.add(question)
            yield Task(family, question, answer), entry["metadata"]


def generate(family: str, seed: int, seen: set[str]) -> Iterator[Task]:
    """Yield tasks of `family` whose question is not in `seen`, adding each question to it.

    Ends when the generator gives hardly anything new. The order depends on `seed` and on `seen` alone.
    """
    for chunk in range(_MAX_CHUNKS):
        fresh = 0
        for task, _ in chunk_of(family, seed, chunk, seen):
            fresh += 1
            yield task
        if fresh < _CHUNK // 100:
            return
