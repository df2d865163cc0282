"""Rows of a benchmark file: JSON lines, JSON, CSV, parquet or Arrow, a file or a downloaded data set folder."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from ...errors import UserError
from .benchmark import Benchmark, Row

_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".arrow", ".csv")
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
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet

            yield from pyarrow.parquet.read_table(file).to_pylist()
        elif file.suffix == ".arrow":
            import pyarrow

            with pyarrow.memory_map(str(file)) as source:
                yield from pyarrow.ipc.open_stream(source).read_all().to_pylist()
        elif file.suffix == ".csv":
            with file.open(newline="", encoding="utf-8") as stream:
                yield from csv.DictReader(stream)
        elif file.suffix == ".json":
            loaded = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(loaded, list):
                raise UserError(f"{file}: expected a JSON list of rows")
            yield from loaded
        else:
            yield from _lines(file)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise UserError(f"{file}: cannot be read ({error})") from None


def _lines(file: Path) -> Iterator[Row]:
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{file} line {number}: not valid JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise UserError(f"{file} line {number}: expected a JSON object")
            yield row


def take(row: Row, *names: str, where: str):
    """The value of the first of these keys that the row has. Raises `UserError` if it has none."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    have = ", ".join(sorted(map(str, row))) or "none"
    raise UserError(f"{where}: no key {' or '.join(names)} (found {have})")


def is_authors(row: Row) -> bool:
    """A row of the authors' files: `uid`, and the prompt as messages."""
    return isinstance(row.get("uid"), str | int) and isinstance(row.get("prompt"), list)


def ask(text: str) -> list[dict[str, str]]:
    """One user turn."""
    return [{"role": "user", "content": text}]
