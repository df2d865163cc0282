"""Parts of an answer: what follows the thinking, the last box, the last block of code."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_FENCE = re.compile(r"^\s*```", re.MULTILINE)


def after_thinking(text: str) -> str:
    """The answer proper: behind the last `</think>`; nothing if the thinking never ended."""
    _, mark, after = text.rpartition("</think>")
    if not mark and text.lstrip().startswith("<think>"):
        return ""
    return (after if mark else text).strip()


def last_box(text: str) -> str | None:
    """What stands in the last complete `\\boxed{...}`; None without one."""
    for start in reversed([match.end() for match in _BOX.finditer(text)]):
        depth = 1
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[start:place].strip()
    return None


def last_code_block(text: str) -> str | None:
    """The last fenced block; None without two fences."""
    lines = text.splitlines()
    fences = [number for number, line in enumerate(lines) if "```" in line]
    if len(fences) < 2:
        return None
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]).strip("\n")
