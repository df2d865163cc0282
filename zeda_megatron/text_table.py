"""Tables as text: columns in line for a terminal, or Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], align: str = "", indent: str = "") -> list[str]:
    """Lines of a table whose columns are as wide as their longest cell, two spaces apart.

    Args:
        rows: the head among them; a row may end early.
        align: a letter for each column from the first on, `l` or `r`. Default: `l` for the first, `r` for the others.
        indent: stands before every line.
    """
    count = max((len(row) for row in rows), default=0)
    kinds = align or "l" + "r" * count
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(count)]

    def line(row: Sequence[str]) -> str:
        cells = (c.ljust(w) if kind == "l" else c.rjust(w) for c, w, kind in zip(row, widths, kinds))
        return (indent + "  ".join(cells)).rstrip()

    return [line(row) for row in rows]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(row) + " |"

    return [line(head), "|" + "---|" * len(head), *map(line, rows)]
