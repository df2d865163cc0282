"""An append-only file of JSON lines: what is in it survives a kill at any moment."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

from ...errors import UserError


class LinesFile:
    """Lines are on disk before `append` returns. A line that was cut off is dropped when the file is opened again.

    Raises `UserError` for a file that holds anything but JSON objects, a line each.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = self._read()
        self._file = path.open("ab")
        self._lock = threading.Lock()

    def _read(self) -> list[dict]:
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with self.path.open("r+b") as stream:
                stream.truncate(len(whole))
                os.fsync(stream.fileno())
        return parse_lines(whole, self.path)

    def append(self, lines: list[dict]) -> None:
        """Add lines, all of them or, if the machine dies now, the first few."""
        data = "".join(json.dumps(line, ensure_ascii=True) + "\n" for line in lines).encode()
        with self._lock:
            self._file.write(data)
            self._file.flush()
            os.fsync(self._file.fileno())
            self.lines += lines

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> LinesFile:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def parse_lines(data: bytes, path: Path) -> list[dict]:
    """JSON objects, one a line. Raises `UserError` naming file and line."""
    lines = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{path} line {number}: damaged ({error}); delete that line, or the file"
            ) from None
        if not isinstance(value, dict):
            raise UserError(f"{path} line {number}: expected a JSON object")
        lines.append(value)
    return lines
