"""Plots of the report: training curves, zero share per layer, skipped picks per expert."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

from markupsafe import Markup

from zeda_megatron.evaluation.comparison.plots import Drawing, colour, number, span

Point = tuple[float, float]
_HOVER = 2048
"""Cells above which a grid has no hover texts: they would make the page several times as large."""


def training_plots(
    history: dict[str, list[dict]], places: dict[str, int]
) -> list[tuple[str, list[str], Markup]]:
    """Distillation loss (arms of very different loss apart) and zero share over steps: title, arms, plot."""
    curves = {name: _curve(history.get(name) or [], "kd_loss") for name in places}
    shares = {name: _curve(history.get(name) or [], "zero_share") for name in places}
    groups = _by_magnitude({name: points for name, points in curves.items() if points})
    shares = {name: points for name, points in shares.items() if points}
    size = (500, 280) if len(groups) + bool(shares) < 3 else (370, 260)
    panels = []
    for title, names in zip(("Distillation loss", "Distillation loss, larger scale"), groups):
        values = [y for name in names for _, y in curves[name] if y > 0]
        log = bool(values) and max(values) / min(values) > 8
        plot = _lines({name: curves[name] for name in names}, places, "loss per token", size, log)
        panels.append((title, names, plot))
    if shares:
        panels.append(("Zero share", list(shares), _lines(shares, places, "zero share", size, level=0.5)))
    return panels


def _lines(
    curves: dict[str, list[Point]],
    places: dict[str, int],
    y_label: str,
    size: tuple[int, int],
    log: bool = False,
    level: float | None = None,
) -> Markup:
    """Single values pale, their running means strong; `level` is a dashed line."""
    drawing = Drawing(f"{y_label} over step", size, "step", y_label)
    axes, kept = drawing.axes, []
    for name, points in curves.items():
        points = [p for p in points if p[1] > 0 or not log]
        kept += [y for _, y in points]
        look = {"color": colour(places[name]), "solid_capstyle": "round"}
        axes.plot(*zip(*points), linewidth=1, alpha=0.28, **look)
        means = running_mean(points, max(1, len(points) // 20))
        (line,) = axes.plot(*zip(*means), linewidth=2.2, zorder=3, **look)
        drawing.titled(line, f"{name}: {number(means[-1][1])} at {number(means[-1][0])}")
    if level is not None:
        axes.axhline(level, color=colour("soft"), linewidth=1, dashes=(4, 4))
        kept.append(level)
    axes.margins(x=0.01)
    axes.set_ylim(*span(kept, 0.06, log))
    if log:
        drawing.log_y()
    return Markup(drawing.svg())


def layer_plot(values: list[float | None], place: int) -> Markup | None:
    """One bar per layer, the mean dashed; nothing without a value."""
    known = {i: min(max(v, 0.0), 1.0) for i, v in enumerate(values) if v is not None}
    if not known:
        return None
    drawing = Drawing("one bar per layer", (240, 120))
    axes = drawing.axes
    bars = axes.bar(list(known), list(known.values()), 0.72 if len(values) < 60 else 1.0, color=colour(place))
    for layer, bar in zip(known, bars):
        drawing.titled(bar, f"layer {layer}: {values[layer]:.3f}")
    axes.axhline(statistics.fmean(known.values()), color=colour("soft"), linewidth=1, dashes=(4, 4))
    axes.set(xlim=(-0.6, len(values) - 0.4), ylim=(0, 1), yticks=(0, 0.5, 1))
    axes.spines["bottom"].set_visible(False)
    _ends(axes.set_xticks, axes.get_xticklabels, "layer", len(values))
    return Markup(drawing.svg())


def expert_plot(rows: list[list[float | None]], place: int) -> Markup | None:
    """One cell per layer and expert, darker for more; layers without a value are left out, all of them: nothing."""
    rows = [[math.nan if v is None else v for v in row] for row in rows if any(v is not None for v in row)]
    if not rows:
        return None
    columns = max(map(len, rows))
    step = 254 / columns
    drawing = Drawing("one cell per layer and expert", (300, round(len(rows) * max(min(step, 22), 5)) + 24))
    axes = drawing.axes
    hover = len(rows) * columns <= _HOVER
    for layer, row in enumerate(rows):
        cells = {expert: v for expert, v in enumerate(row) if math.isfinite(v)}
        bars = axes.barh(
            [layer] * len(cells), 0.94, 0.92, left=[e - 0.47 for e in cells], color=colour(place)
        )
        for (expert, value), bar in zip(cells.items(), bars):
            bar.set(alpha=min(max(value, 0.0), 1.0), edgecolor="none")
            if hover:
                drawing.titled(bar, f"layer {layer}, expert {expert}: {value:.3f}")
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(len(rows) - 0.5, -0.5))
    _ends(axes.set_xticks, axes.get_xticklabels, "expert", columns)
    axes.set_yticks([0, len(rows) - 1], ["layer 0", f"layer {len(rows) - 1}"])
    return Markup(drawing.svg())


def _ends(set_ticks, get_labels, noun: str, count: int) -> None:
    """Name the first and the last of a horizontal axis, inside its ends."""
    set_ticks([-0.4, count - 0.6], [f"{noun} 0", f"{noun} {count - 1}"])
    for label, side in zip(get_labels(), ("left", "right")):
        label.set_horizontalalignment(side)


def running_mean(points: list[Point], window: int) -> list[Point]:
    """Mean of the last `window` values at each point."""
    values = [y for _, y in points]
    return [(x, statistics.fmean(values[max(0, i + 1 - window) : i + 1])) for i, (x, _) in enumerate(points)]


def _curve(lines: list[dict], field: str) -> list[Point]:
    points = [(line.get("step"), line.get(field)) for line in lines]
    numbers = [p for p in points if all(isinstance(v, int | float) and math.isfinite(v) for v in p)]
    return [(float(x), float(y)) for x, y in numbers]


def _by_magnitude(curves: dict[str, list[Point]]) -> list[list[str]]:
    """One group of arms, or two where typical losses lie more than tenfold apart (CE and KL arms)."""
    level = {name: abs(statistics.median(y for _, y in points)) or 1e-12 for name, points in curves.items()}
    names = sorted(level, key=level.__getitem__)
    jumps = [level[b] / level[a] for a, b in pairwise(names)]
    if not jumps or max(jumps) < 10:
        return [list(curves)] if curves else []
    low = set(names[: jumps.index(max(jumps)) + 1])
    return [[n for n in curves if n in low], [n for n in curves if n not in low]]
