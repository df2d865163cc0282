"""Parts of an answer: what follows the thinking, the last box, the last block of code. All take time linear in it."""

from __future__ import annotations

import re

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
