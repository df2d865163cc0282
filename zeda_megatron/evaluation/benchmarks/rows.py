"""Rows of a benchmark file: JSON lines, JSON, CSV, parquet or Arrow, a file or a downloaded data set folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...data.jsonl import read_lines
from ...data.records import Message, parse_prompt
from ...errors import UserError, cut_short, shown
from ...regular_file import open_regular, read_regular, require_regular
from ...strict_json import is_number, strict_loads
from .benchmark import Benchmark, Row

_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".arrow", ".csv")
_MOST, _MOST_ROWS = 2 << 30, 1_000_000
"""Bytes and rows of one file, unpacked."""
AUTHORS = "TsinghuaC3I/ZEDA-Evaluation"
"""The data set of the paper's authors: one file `<name>.jsonl` per benchmark."""


def read_rows(benchmark: Benchmark, data: str | None) -> list[Row]:
    """The rows of a benchmark: from the folder `data` (`--data`), or from the package that ships them.

    Looked for are `<data>/<name>` with one of the endings above, there or one folder below, then the folder
    `<data>/<name>/` with a copy of the original data set.

    Raises:
        UserError: nothing there (says what to download, from where, to where), or a file that cannot be read.
    """
    if data is not None:
        root = Path(data)
        if not root.is_dir():
            raise UserError(f"--data {data}: no such folder")
        for below in ("", "*/"):  # a download may keep its own folder
            for ending in _ENDINGS:
                for file in sorted(root.glob(f"{below}{benchmark.name}{ending}")):
                    return list(_rows_of(file))
        folder = root / benchmark.name
        if folder.is_dir():
            return _rows_of_folder(folder, benchmark)
    if benchmark.package_rows is not None:
        return benchmark.package_rows()
    raise UserError(missing(benchmark, data))


def missing(benchmark: Benchmark, data: str | None) -> str:
    """What to download, from where, and where to put it."""
    where = f"--data {data}" if data else "--data is not given"
    name, folder = benchmark.name, data or "DATA"
    return (
        f"{name}: no questions ({where}); get {name}.jsonl with `hf download {AUTHORS} --repo-type dataset --local-dir "
        f"{folder}`, or the original with `hf download {benchmark.source.dataset} --repo-type dataset --local-dir "
        f"{folder}/{name}`, then --data {folder} (docs/evaluation.md)"
    )


def _rows_of_folder(folder: Path, benchmark: Benchmark) -> list[Row]:
    wanted = benchmark.source.files or tuple(f"**/*{ending}" for ending in _ENDINGS)
    for pattern in wanted:
        files = sorted(path for path in folder.glob(pattern) if path.name.endswith(_ENDINGS))
        if files:
            return [row for file in files for row in _rows_of(file)]
    raise UserError(f"{folder}: holds none of {', '.join(wanted)}; {missing(benchmark, str(folder.parent))}")


def _rows_of(file: Path) -> Iterator[Row]:
    readers = {".parquet": _parquet, ".arrow": _arrow, ".csv": _csv, ".json": _json}
    reader = readers.get(file.suffix, _lines)
    try:
        for where, row in reader(file):
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
            yield FileRow(row, where)
    except UserError:
        raise
    except (OSError, ValueError, csv.Error, NotImplementedError, LookupError, TypeError) as error:
        # pyarrow's own errors are of all these kinds
        raise UserError(f"{file}: cannot be read ({type(error).__name__}: {error})") from None


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    return read_lines(file, _MOST)


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    with open_regular(file) as stream:
        table = pyarrow.parquet.ParquetFile(stream)
        groups = (table.metadata.row_group(i) for i in range(table.metadata.num_row_groups))
        _bound(file, table.metadata.num_rows, sum(group.total_byte_size for group in groups))
        yield from _numbered(file, table.read().to_pylist())


def _arrow(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow

    require_regular(file)
    with pyarrow.memory_map(str(file)) as source:
        table = pyarrow.ipc.open_stream(source).read_all()
        _bound(file, table.num_rows, table.nbytes)
        yield from _numbered(file, table.to_pylist())


def _csv(file: Path) -> Iterator[tuple[str, Any]]:
    with open_regular(file) as stream:
        reader = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), strict=True)
        for row in reader:
            where = f"{file} line {reader.line_num}"
            if None in row:
                raise UserError(f"{where}: has more fields than the first line")
            yield where, row


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    loaded = strict_loads(read_regular(file, _MOST), finite=False)
    if not isinstance(loaded, list):
        raise UserError(f"{file}: expected a JSON list of rows")
    yield from _numbered(file, loaded)


def _numbered(file: Path, rows: list) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows, 1):
        yield f"{file} row {number}", row


def _bound(file: Path, rows: int, size: int) -> None:
    if rows > _MOST_ROWS or size > _MOST:
        raise UserError(f"{file}: has {rows} rows and {size} bytes, more than any benchmark")


class FileRow(dict):
    """A row that knows where it stands."""

    def __init__(self, row: Row, where: str):
        super().__init__(row)
        self.where = where


def numbered(rows: list[Row], name: str) -> Iterator[tuple[str, Row]]:
    """Each row, and before it what opens a message about it: file and line, or the benchmark's name and a number."""
    for number, row in enumerate(rows, 1):
        yield getattr(row, "where", f"{name} row {number}"), row


def take(row: Row, *names: str, where: str) -> Any:
    """The value of the first of these keys that the row has. Raises `UserError` if it has none."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    have = cut_short(", ".join(sorted(map(str, row))) or "none", 200)
    raise UserError(f"{where}: no key {' or '.join(names)} (found {have})")


def take_text(row: Row, *names: str, where: str) -> str:
    """The same for a text that is not blank."""
    value = take(row, *names, where=where)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {' or '.join(names)} must be text, found {shown(value)}")
    return value


def take_word(row: Row, *names: str, where: str) -> str:
    """The same for a text or a number, as text."""
    value = take(row, *names, where=where)
    if is_number(value):
        return str(value)
    return take_text(row, *names, where=where)


def take_name(row: Row, name: str, where: str) -> str:
    """The same for the name of a function."""
    value = take_text(row, name, where=where)
    if not value.isidentifier():
        raise UserError(f"{where}: {name} must be the name of a function, found {shown(value)}")
    return value


def take_list(row: Row, name: str, where: str) -> list:
    """The value of a key that holds a list with something in it."""
    value = take(row, name, where=where)
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {name} must be a list with something in it, found {shown(value)}")
    return value


def is_authors(row: Row) -> bool:
    """A row of the authors' files: `uid`, and the prompt as messages."""
    return row.get("uid") is not None and isinstance(row.get("prompt"), list)


def asked(row: Row, where: str) -> list[Message]:
    """The messages of an authors' row."""
    return parse_prompt({"prompt": row["prompt"]}, where).messages


def ask(text: str) -> list[Message]:
    """One user turn."""
    return [{"role": "user", "content": text}]
