"""A grid of shares as inline SVG: darker is more."""

from __future__ import annotations

import math
from html import escape

_HOVER = 2048
"""Cells above which a grid has no hover texts: they would make the page several times as large."""


def grid(rows: list[list[float | None]], style: int, row_noun: str, column_noun: str) -> str:
    """One cell per value between 0 and 1; None leaves it empty. "" if there is no value.

    Args:
        style: number of the colour class, as in `svg.bars`.
        row_noun, column_noun: what rows and columns are, for the labels and the hover texts.
    """
    columns = max((len(row) for row in rows), default=0)
    known = [value for row in rows for value in row if value is not None and math.isfinite(value)]
    if not known:
        return ""
    width, left, foot = 300, 46, 18
    step = (width - left) / columns
    tall = max(min(step, 22.0), 5.0)
    height = len(rows) * tall + foot
    hover = len(known) <= _HOVER
    body = []
    for r, row in enumerate(rows):
        if r in (0, len(rows) - 1):
            at = (r + 0.5) * tall + 4
            body.append(
                f'<text class="tick" x="{left - 6}" y="{at:.1f}" text-anchor="end">{escape(row_noun)} {r}</text>'
            )
        for c, value in enumerate(row):
            if value is None or not math.isfinite(value):
                continue
            title = (
                f"<title>{escape(row_noun)} {r}, {escape(column_noun)} {c}: {value:.3f}</title>"
                if hover
                else ""
            )
            body.append(
                f'<rect class="bar c{style}" x="{left + c * step + 0.5:.1f}" y="{r * tall + 0.5:.1f}" '
                f'width="{max(step - 1, 0.5):.1f}" height="{tall - 1:.1f}" '
                f'fill-opacity="{min(max(value, 0.0), 1.0):.2f}">{title}</rect>'
            )
    for c, anchor in ((0, "start"), (columns - 1, "end")):
        at = left if anchor == "start" else width
        body.append(
            f'<text class="tick" x="{at}" y="{height - 4:.1f}" text-anchor="{anchor}">'
            f"{escape(column_noun)} {c}</text>"
        )
    name = f"one cell per {row_noun} and {column_noun}"
    return f'<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(name)}">{"".join(body)}</svg>'
