"""Append-only files of JSON lines: what is in them survives a kill at any moment."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..data.jsonl import parse_line
from ..durable_file import append_whole, sync, write_atomically, writing
from ..errors import UserError
from ..regular_file import MAX_BYTES, is_regular, open_regular

Parse = Callable[[Any, str], Any]
"""A line's value and where it stands to what is kept of it. Raises `UserError` for what is no such line."""


class LinesFile:
    """Lines are on disk before `append` returns. A line that was cut off is dropped when the file is opened again.

    Args:
        flag: what the user named the file with.
        parse: checks a line of the file as it is found.
        keep: what is remembered of a line, found or appended.
        finite: lines have no infinities.
        ascii: letters beyond ASCII are written as escapes.

    Attributes:
        lines: what was kept of each line.

    Raises `UserError` for a file that holds anything else, and names the line.
    """

    def __init__(
        self,
        path: Path,
        flag: str,
        parse: Parse,
        keep: Callable[[Any], Any] = lambda line: line,
        finite: bool = True,
        ascii: bool = True,
    ):
        self.path, self.keep, self.finite, self.ascii = path, keep, finite, ascii
        self._told = f"{flag} {path}"
        self.lines, whole = read_whole_lines(path, lambda line, where: keep(parse(line, where)), finite)
        with writing(self._told):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size > whole:
                os.truncate(path, whole)
                sync(path)
        self._lock = threading.Lock()

    def append(self, lines: list[dict]) -> None:
        """Add lines, all of them or, if the machine dies now, the first few. Raises `UserError` if the disk refuses;
        then none of them is there."""
        texts = [self._text(line) for line in lines]
        with self._lock, writing(self._told):
            append_whole(self.path, "".join(texts).encode())
            self.lines += [self.keep(json.loads(text)) for text in texts]

    def _text(self, line: dict[str, Any]) -> str:
        """The line. Half a character (a lone surrogate) could not be read again: a mark takes its place."""
        text = json.dumps(line, ensure_ascii=self.ascii, allow_nan=not self.finite)
        if "\\ud" in text or not self.ascii:
            whole = json.dumps(line, ensure_ascii=False).encode("utf-8", "replace")
            text = json.dumps(json.loads(whole), ensure_ascii=self.ascii)
        return text + "\n"


def read_whole_lines(path: Path, parse: Parse, finite: bool = True) -> tuple[list[Any], int]:
    """What `parse` keeps of the lines of a file that may not be there, and how many bytes they are.

    A last line without its end is one that a kill has cut off; it does not count. Raises `UserError` naming file and
    line.
    """
    lines: list[Any] = []
    if not is_regular(path):
        return lines, 0
    whole = 0
    try:
        with open_regular(path) as stream:
            while (raw := stream.readline(MAX_BYTES + 1)).endswith(b"\n"):
                where = f"{path} line {len(lines) + 1}"
                lines.append(parse(parse_line(raw, where, finite), where))
                whole += len(raw)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(raw) > MAX_BYTES:
        raise UserError(f"{path} line {len(lines) + 1}: is longer than {MAX_BYTES} bytes")
    return lines, whole


def rewind(path: Path, wanted: Callable[[Any], bool], say: Callable[[str], None]) -> None:
    """Keep the lines that are wanted, as they stand; the file is replaced as a whole. It may not be there.

    Lines that nobody can read are dropped: a last one without its end in silence, of others `say` tells in one line.
    `wanted` may raise ValueError, KeyError or TypeError for what is no such line.
    """
    if not path.is_file():
        return
    kept, unreadable = [], []
    found = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(found, 1):
        try:
            if wanted(json.loads(line)):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            if number < len(found):  # behind the last line's end stands nothing, or what a kill has cut off
                unreadable.append(number)
    if unreadable:
        say(
            f"{path} line {unreadable[0]}: cannot be read and is dropped"
            + (f" ({len(unreadable)} such lines in all)" if len(unreadable) > 1 else "")
        )
    write_atomically(path, "".join(line + "\n" for line in kept))
