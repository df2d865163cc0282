"""Plots of the report page: frontier, training curves, zero share per layer."""

from __future__ import annotations

import math
import statistics
from html import escape
from itertools import pairwise

from . import svg
from .legend import Arm
from .page_tables import breakable, key
from .svg_grid import grid
from .svg_scale import Point, running_mean, span


def frontier_plot(report: dict, order: list[str], arms: dict[str, Arm]) -> str:
    """Zero share against KL, drawn twice: for wide and for narrow windows."""
    style = {name: i for i, name in enumerate(arms)}
    marks = []
    for name in order:
        m, arm = report["arms"][name], arms[name]
        x, y = m["zero_share"], m["kl_to_teacher"]
        if x is not None and y is not None:
            text = f"{name}: zero share {x:.3f}, KL {y:.4f}"
            marks.append(svg.Mark(name, x, y, style[name], arm.baseline, not arm.trained, text))
    positive = [m.y for m in marks if m.y > 0]
    log = len(positive) > 1 and max(positive) / min(positive) > 3
    labels = ("zero share (picks skipped)", "KL to the teacher")
    wide, narrow = (svg.scatter(marks, *labels, log, size) for size in ((1000, 430), (400, 400)))
    return wide and f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'


def training_plots(history: dict[str, list[dict]], arms: dict[str, Arm]) -> str:
    """Distillation loss (arms of very different loss apart) and zero share over steps."""
    curves = {name: _curve(history.get(name) or [], "kd_loss") for name in arms}
    shares = {name: _curve(history.get(name) or [], "zero_share") for name in arms}
    groups = _by_magnitude({name: points for name, points in curves.items() if points})
    shares = {name: points for name, points in shares.items() if points}
    count = len(groups) + bool(shares)
    size = (500, 280) if count < 3 else (370, 260)
    panels = []
    for title, names in zip(("Distillation loss", "Distillation loss, larger scale"), groups):
        values = [y for name in names for _, y in curves[name] if y > 0]
        log = bool(values) and max(values) / min(values) > 8
        plot = svg.line_chart(_series(names, curves, arms), "step", "loss per token", log, size=size)
        panels.append(_panel(title, names, arms, plot))
    if shares:
        limits = span([0.5, *(y for points in shares.values() for _, y in points)], 0.1)
        plot = svg.line_chart(
            _series(list(shares), shares, arms),
            "step",
            "zero share",
            y_range=limits,
            reference=0.5,
            size=size,
        )
        panels.append(_panel("Zero share", list(shares), arms, plot))
    return panels and f'<div class="panels">{"".join(panels)}</div>'


def layer_plots(report: dict, order: list[str], arms: dict[str, Arm]) -> str:
    """One small bar chart per arm."""
    style = {name: i for i, name in enumerate(arms)}
    plots = []
    for name in order:
        values = report["arms"][name].get("zero_share_by_layer")
        plot = svg.bars(values, style[name], "layer") if values else ""
        if plot:
            plots.append(f"<div><h3>{breakable(name)}</h3>{plot}</div>")
    return plots and f'<div class="small">{"".join(plots)}</div>'


def expert_plots(report: dict, order: list[str], arms: dict[str, Arm]) -> str:
    """One grid per arm that says which experts' picks it skipped."""
    style = {name: i for i, name in enumerate(arms)}
    plots = []
    for name in order:
        rows = report["arms"][name].get("skipped_by_expert")
        plot = (
            grid([row for row in rows if any(v is not None for v in row)], style[name], "layer", "expert")
            if rows
            else ""
        )
        if plot:
            plots.append(f"<div><h3>{breakable(name)}</h3>{plot}</div>")
    return plots and f'<div class="small wider">{"".join(plots)}</div>'


def _curve(lines: list[dict], field: str) -> list[Point]:
    points = [(line.get("step"), line.get(field)) for line in lines]
    numbers = [p for p in points if all(isinstance(v, int | float) and math.isfinite(v) for v in p)]
    return [(float(x), float(y)) for x, y in numbers]


def _series(names: list[str], curves: dict[str, list[Point]], arms: dict[str, Arm]) -> list[svg.Series]:
    series = []
    for name in names:
        points, style = curves[name], list(arms).index(name)
        series.append(svg.Series(name, points, style, faint=True))
        series.append(svg.Series(name, running_mean(points, max(1, len(points) // 20)), style))
    return series


def _by_magnitude(curves: dict[str, list[Point]]) -> list[list[str]]:
    """One group of arms, or two where typical losses lie more than tenfold apart (CE and KL arms)."""
    level = {name: abs(statistics.median(y for _, y in points)) or 1e-12 for name, points in curves.items()}
    names = sorted(level, key=level.__getitem__)
    jumps = [level[b] / level[a] for a, b in pairwise(names)]
    if not jumps or max(jumps) < 10:
        return [list(curves)] if curves else []
    low = set(names[: jumps.index(max(jumps)) + 1])
    return [[n for n in curves if n in low], [n for n in curves if n not in low]]


def _panel(title: str, names: list[str], arms: dict[str, Arm], plot: str) -> str:
    signs = (f'<li class="c{list(arms).index(n)}">{key(arms[n])}{escape(n)}</li>' for n in names)
    return f'<div><h3>{title}</h3><ul class="keys">{"".join(signs)}</ul>{plot}</div>'
