"""JSON lines from files that nobody has checked: plain or gzipped, each line with its number."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError
from ..regular_file import MAX_BYTES, open_regular
from ..strict_json import strict_loads

_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_OTHERS = {
    b"\x28\xb5\x2f\xfd": "a zstd file: unpack it",
    b"\xfd7zXZ": "an xz file: unpack it",
    b"BZh": "a bzip2 file: unpack it",
    b"PK\x03\x04": "a zip file: unpack it",
    b"PAR1": "a parquet file: write it as JSON lines",
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
}
"""What a file begins with that is not JSON, and what to do with it."""


def open_lines(file: str | Path) -> BinaryIO:
    """Open a file, and unpack it as it is read if it is gzipped. Raises `UserError` for what is no such file."""
    try:
        stream = open_regular(file)
        head = stream.read(8)
        stream.seek(0)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    if not head:
        raise UserError(f"{file}: the file is empty")
    for magic, what in _OTHERS.items():
        if head.startswith(magic):
            raise UserError(f"{file}: is {what}")
    return gzip.open(stream) if head.startswith(_GZIP) else stream


def read_lines(file: str | Path, longest: int = MAX_BYTES) -> Iterator[tuple[str, Any]]:
    """("FILE line N", value) of every line that is not blank; a byte order mark at the beginning is passed over.

    Args:
        longest: bytes that a line may have.

    Raises:
        UserError: the file cannot be read, has no lines with content, or a line is not JSON; it names the line.
    """
    number = 0
    with open_lines(file) as stream:
        for number, raw in _numbered(stream, file, longest):
            where = f"{file} line {number}"
            yield where, parse_line(raw, where)
    if not number:
        raise UserError(f"{file}: no lines with content")


def _numbered(stream: BinaryIO, file: str | Path, longest: int) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        while raw := stream.readline(longest + 1):
            number += 1
            if len(raw) > longest:
                raise UserError(f"{file} line {number}: is longer than {longest} bytes")
            if number == 1:
                raw = raw.removeprefix(_BOM)
            if raw.strip():
                yield number, raw
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{file} line {number + 1}: the gzip file is damaged or cut off here") from None
    except OSError as error:
        raise UserError(f"{file} line {number + 1}: cannot be read ({error.strerror})") from error


def parse_line(raw: bytes, where: str, finite: bool = False) -> Any:
    """The value of one line (`strict_loads`). Raises `UserError`, opened by `where`."""
    try:
        return strict_loads(raw, finite)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg}, column {error.colno})") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
