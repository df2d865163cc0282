"""An append-only file of JSON lines: what is in it survives a kill at any moment."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from ...data.jsonl import parse_line
from ...durable_file import append_whole, sync, writing
from ...errors import UserError
from ...regular_file import MAX_BYTES, is_regular, open_regular
from .saved import Parse


class LinesFile:
    """Lines are on disk before `append` returns. A line that was cut off is dropped when the file is opened again.

    Args:
        parse: checks a line of the file as it is found (`saved`).

    Raises `UserError` for a file that holds anything else, and names the line.
    """

    def __init__(self, path: Path, parse: Parse):
        self.path = path
        self.lines, whole = read_whole_lines(path, parse)
        with writing(f"--output {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size > whole:
                os.truncate(path, whole)
                sync(path)
        self._lock = threading.Lock()

    def append(self, lines: list[dict]) -> None:
        """Add lines, all of them or, if the machine dies now, the first few. Raises `UserError` if the disk refuses."""
        texts = [_text(line) for line in lines]
        with self._lock, writing(f"--output {self.path}"):
            append_whole(self.path, "".join(texts).encode())
            self.lines += map(json.loads, texts)


def read_whole_lines(path: Path, parse: Parse) -> tuple[list[dict[str, Any]], int]:
    """What `parse` keeps of the lines of a file that may not be there, and how many bytes they are.

    A last line without its end is one that a kill has cut off; it does not count. Raises `UserError` naming file and
    line.
    """
    lines: list[dict[str, Any]] = []
    if not is_regular(path):
        return lines, 0
    whole = 0
    try:
        with open_regular(path) as stream:
            while (raw := stream.readline(MAX_BYTES + 1)).endswith(b"\n"):
                where = f"{path} line {len(lines) + 1}"
                lines.append(parse(parse_line(raw, where, finite=True), where))
                whole += len(raw)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(raw) > MAX_BYTES:
        raise UserError(f"{path} line {len(lines) + 1}: is longer than {MAX_BYTES} bytes")
    return lines, whole


def _text(line: dict[str, Any]) -> str:
    """The line in ASCII. Half a character (a lone surrogate) could not be read again: a mark takes its place."""
    text = json.dumps(line, allow_nan=False)
    if "\\ud" in text:
        whole = json.dumps(line, ensure_ascii=False).encode("utf-8", "replace")
        text = json.dumps(json.loads(whole))
    return text + "\n"
