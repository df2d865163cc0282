"""Small SVG charts as strings, for pages without scripts or assets.

Colours come from the page: a series of style k gets the class `c<k>`, to which the page's stylesheet gives a
`--c` for light and for dark. Hovering shows exact values through SVG's own `<title>`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

from .svg_scale import Axis, Point, number, span, thin


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    label: str
    points: list[Point]
    style: int = 0
    """Number of the colour class."""
    faint: bool = False
    """Drawn thin and pale: raw values behind their running mean."""


@dataclass(frozen=True)
class Mark:
    """One labelled point of a scatter plot."""

    label: str
    x: float
    y: float
    style: int = 0
    square: bool = False
    hollow: bool = False
    title: str = ""
    """Text shown when hovering."""


def line_chart(
    series: list[Series],
    x_label: str,
    y_label: str,
    log_y: bool = False,
    y_range: tuple[float, float] | None = None,
    reference: float | None = None,
    size: tuple[int, int] = (460, 270),
) -> str:
    """Lines over x; `reference` draws a dashed level; points that are not finite are skipped."""
    width, height = size
    points = [p for s in series for p in s.points if _drawable(p, log_y)]
    if not points:
        return ""
    low, high = y_range or span([y for _, y in points], log=log_y)
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    ys = Axis(low, high, height - 44, 14, log_y)
    xs = Axis(x_low, x_high if x_high > x_low else x_low + 1, _margin(ys), width - 14)
    body = [_frame(xs, ys, x_label, y_label, size)]
    if reference is not None and low <= reference <= high:
        at = ys(reference)
        body.append(f'<path class="ref" d="M{xs.start} {at:.1f}H{xs.end}"/>')
    for one in sorted(series, key=lambda s: not s.faint):
        kept = [p for p in one.points if _drawable(p, log_y)]
        if not kept:
            continue
        path = "L".join(f"{xs(x):.1f} {ys(min(max(y, low), high)):.1f}" for x, y in thin(kept))
        name = "line faint" if one.faint else "line"
        last = f"{one.label}: {number(kept[-1][1])} at {number(kept[-1][0])}"
        body.append(f'<path class="{name} c{one.style}" d="M{path}"><title>{escape(last)}</title></path>')
    return _svg(size, f"{y_label} over {x_label}", body)


def scatter(
    marks: list[Mark], x_label: str, y_label: str, log_y: bool = False, size: tuple[int, int] = (700, 400)
) -> str:
    """Labelled points; labels step aside until they touch neither each other nor a point."""
    width, height = size
    marks = [m for m in marks if _drawable((m.x, m.y), log_y)]
    if not marks:
        return ""
    ys = Axis(*span((m.y for m in marks), 0.08, log_y), height - 46, 16, log_y)
    xs = Axis(*span((m.x for m in marks), 0.12), _margin(ys), width - 20)
    body = [_frame(xs, ys, x_label, y_label, size)]
    taken = [(xs(m.x) - 7, ys(m.y) - 7, xs(m.x) + 7, ys(m.y) + 7) for m in marks]
    for m in sorted(marks, key=lambda m: (m.y, m.x)):
        x, y = xs(m.x), ys(m.y)
        label = m.label if len(m.label) <= 26 else m.label[:25] + "…"
        box, anchor, leader = _place(x, y, 7.0 * len(label), taken, (xs.start, ys.end, width, ys.start))
        taken.append(box)
        kind = f"mark c{m.style}{' hollow' if m.hollow else ''}"
        title = f"<title>{escape(m.title or m.label)}</title>"
        if leader:
            body.append(f'<path class="leader" d="M{x:.1f} {y:.1f}L{leader[0]:.1f} {leader[1]:.1f}"/>')
        if m.square:
            shape = f'<rect x="{x - 5.5:.1f}" y="{y - 5.5:.1f}" width="11" height="11" rx="1.5"'
        else:
            shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6.2"'
        body.append(f'{shape} class="{kind}">{title}</{"rect" if m.square else "circle"}>')
        text_x = box[0] if anchor == "start" else box[2]
        body.append(
            f'<text class="label" x="{text_x:.1f}" y="{box[1] + 12:.1f}" text-anchor="{anchor}">'
            f"{escape(label)}</text>"
        )
    return _svg(size, f"{y_label} against {x_label}", body)


def bars(values: list[float | None], style: int, noun: str, size: tuple[int, int] = (240, 120)) -> str:
    """One bar per value in [0, 1], with the mean as a dashed level. `noun` names a bar when hovering."""
    width, height = size
    known = [v for v in values if v is not None]
    if not known:
        return ""
    xs, ys = Axis(0, len(values), 28, width - 4), Axis(0, 1, height - 18, 6)
    body = []
    for tick in (0, 0.5, 1):
        at = ys(tick)
        body.append(f'<path class="grid" d="M{xs.start} {at:.1f}H{xs.end}"/>')
        body.append(f'<text class="tick" x="{xs.start - 5}" y="{at + 4:.1f}" text-anchor="end">{tick}</text>')
    gap = 0.14 if len(values) < 60 else 0.0
    for i, value in enumerate(values):
        if value is None:
            continue
        left, right, top = xs(i + gap), xs(i + 1 - gap), ys(min(max(value, 0.0), 1.0))
        body.append(
            f'<rect class="bar c{style}" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
            f'height="{ys.start - top:.1f}"><title>{escape(noun)} {i}: {value:.3f}</title></rect>'
        )
    mean = ys(sum(known) / len(known))
    body.append(f'<path class="ref" d="M{xs.start} {mean:.1f}H{xs.end}"/>')
    for i, anchor in ((0, "start"), (len(values) - 1, "end")):
        at = xs.start if anchor == "start" else xs.end
        body.append(f'<text class="tick" x="{at}" y="{height - 4}" text-anchor="{anchor}">{noun} {i}</text>')
    return _svg(size, f"one bar per {noun}", body)


def _drawable(point: Point, log_y: bool) -> bool:
    return all(map(math.isfinite, point)) and (point[1] > 0 or not log_y)


def _margin(ys: Axis) -> float:
    """Room left of a plot for the numbers and the name of its vertical axis."""
    return 32 + 6.8 * max((len(number(tick)) for tick in ys.ticks()), default=1)


def _frame(xs: Axis, ys: Axis, x_label: str, y_label: str, size: tuple[int, int]) -> str:
    parts = []
    for tick in ys.ticks():
        at = ys(tick)
        parts.append(f'<path class="grid" d="M{xs.start} {at:.1f}H{xs.end}"/>')
        parts.append(
            f'<text class="tick" x="{xs.start - 7}" y="{at + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    for tick in xs.ticks(6):
        at = xs(tick)
        parts.append(f'<path class="grid" d="M{at:.1f} {ys.start}v5"/>')
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{ys.start + 18}" text-anchor="middle">{number(tick)}</text>'
        )
    middle = (ys.start + ys.end) / 2
    parts.append(f'<path class="axis" d="M{xs.start} {ys.start}H{xs.end}"/>')
    parts.append(
        f'<text class="axis-label" x="{(xs.start + xs.end) / 2:.0f}" y="{size[1] - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    parts.append(
        f'<text class="axis-label" transform="translate(13 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def _place(x: float, y: float, width: float, taken: list, room: tuple[float, float, float, float]):
    """A free box for a label near (x, y): box, text anchor, and the end of a leader line if it is far."""
    left, top, right, bottom = room
    for shift in (0, -14, 14, -26, 26, -38, 38, -52, 52, -66, 66, -80, 80, -96, 96):
        for side in ("start", "end"):
            gap = 11 if abs(shift) < 20 else 20
            x0 = x + gap if side == "start" else x - gap - width
            box = (x0, y + shift - 8, x0 + width, y + shift + 8)
            inside = box[0] >= left and box[2] <= right and box[1] >= top - 8 and box[3] <= bottom
            if inside and not any(_touch(box, other) for other in taken):
                near = (box[0] - 2 if side == "start" else box[2] + 2, y + shift)
                return box, side, near if abs(shift) > 14 else None
    return (x + 11, y - 8, x + 11 + width, y + 8), "start", None


def _touch(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _svg(size: tuple[int, int], name: str, body: list[str]) -> str:
    return (
        f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(name)}">{"".join(body)}</svg>'
    )
