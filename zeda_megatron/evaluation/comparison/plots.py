"""Plots as inline SVG, by matplotlib. Colours are the page's CSS variables: one drawing serves light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ...errors import library

matplotlib, ticker = library("matplotlib"), library("matplotlib.ticker")
Figure = library("matplotlib.figure").Figure

_ROLES = ("ink", "soft", "grid", "card")
_TITLED = re.compile(r'<g id="title(\d+)">')
_PAGE = {"ink": ("#1b2026", "#e8ebee"), "soft": ("#5c6570", "#9aa4af"), "grid": ("#e3e6ea", "#2b313a")}
_PAGE["card"] = ("#ffffff", "#181c22")
"""What a page sets, light and dark."""
_STEPS = (
    (0, 0),
    (0, 15),
    (0, -15),
    (8, 28),
    (8, -28),
    (8, 42),
    (8, -42),
    (8, 58),
    (8, -58),
    (8, 76),
    (8, -76),
)
"""How far a label steps aside of its mark, further right or left and up or down."""


@dataclass(frozen=True)
class Mark:
    """One labelled point of a scatter plot."""

    label: str
    x: float
    y: float
    place: int
    """Number of the arm: its colour is the variable --c<place>."""
    square: bool = False
    hollow: bool = False
    title: str = ""
    """Text shown when hovering."""


class Drawing:
    """One plot on its way to SVG.

    Args:
        name: what it shows, for those who cannot see it.
        size: width and height in CSS pixels.
    """

    def __init__(self, name: str, size: tuple[int, int], x_label: str = "", y_label: str = ""):
        self.name, self._titles = name, []
        self.figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        self.figure.patch.set_visible(False)
        self.axes = axes = self.figure.add_subplot()
        axes.patch.set_visible(False)
        axes.set_axisbelow(True)
        axes.spines[["top", "left", "right"]].set_visible(False)
        axes.spines["bottom"].set_color(colour("soft"))
        axes.grid(axis="y", color=colour("grid"), linewidth=1)
        axes.tick_params(length=0, pad=6, labelcolor=colour("soft"), labelsize=12)
        axes.set_xlabel(x_label, color=colour("soft"), size=12.5, labelpad=6)
        axes.set_ylabel(y_label, color=colour("soft"), size=12.5, labelpad=6)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: number(value)))
            axis.set_major_locator(_round_steps())

    def log_y(self) -> None:
        """A logarithmic vertical axis with plain numbers, also where it spans less than a power of ten."""
        low, high = self.axes.get_ylim()
        self.axes.set_yscale("log")
        self.axes.set_ylim(low, high)
        few, steps = high / low < 10, (1, 2, 5) if high / low < 100 else (1, 3) if high / low < 1000 else (1,)
        where = _round_steps() if few else ticker.LogLocator(subs=steps)
        self.axes.yaxis.set_major_locator(where)
        self.axes.yaxis.set_minor_locator(ticker.NullLocator())
        self.axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: number(value)))

    def titled(self, artist, text: str):
        """The artist, with a text that is shown when hovering over it."""
        artist.set_gid(f"title{len(self._titles)}")
        self._titles.append(text)
        return artist

    def svg(self) -> str:
        """For a page that sets --ink, --soft, --grid, --card and --c0, --c1, ... for light and for dark."""
        out = io.StringIO()
        # Text stays text, and the same drawing is the same file.
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            self.figure.savefig(out, format="svg", metadata={"Date": None})
        text = out.getvalue()
        box, body = re.search(r'viewBox="([^"]*)"', text)[1], re.search(r"(?s)</metadata>(.*)</svg>", text)[1]
        body = re.sub(r"<!--.*?-->|<style.*?</style>", "", body, flags=re.S)
        body = _TITLED.sub(lambda found: f"<g><title>{escape(self._titles[int(found[1])])}</title>", body)
        body = re.sub(r'<g id="[^"]*"/>| transform="rotate\(-0 [^"]*"', "", body)
        body = re.sub(r'<g id="[^"]*">', "<g>", body).replace("xlink:href", "href")
        body = re.sub(r'style="[^"]*"', lambda found: re.sub("#01([0-9a-f]{4})", _variable, found[0]), body)
        body = re.sub(r">[^<]+<", lambda found: found[0].replace('"', "&#34;"), body)  # a name's
        body = re.sub(r"\s+", " ", re.sub(r" font-family: [^;\"]*;", "", body))
        start = f'<svg viewBox="{box}" role="img" aria-label="{escape(self.name)}" stroke-linejoin="round">'
        return f"{start}{body.replace('> <', '><')}</svg>"


def standalone(svg: str, colours: list[tuple[str, str]]) -> str:
    """A drawing as a file of its own, with the colours (light, dark) that a page would have given it."""
    names = _PAGE | {f"c{i}": pair for i, pair in enumerate(colours)}
    light, dark = (";".join(f"--{name}:{pair[i]}" for name, pair in names.items()) for i in (0, 1))
    style = f"<style>svg{{{light}}}@media (prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    start, _, rest = svg.partition(">")
    root = f'{start} xmlns="http://www.w3.org/2000/svg" font-family="system-ui, -apple-system, Segoe UI, sans-serif">'
    return f'{root}{style}<rect width="100%" height="100%" rx="12" fill="var(--card)"/>{rest}\n'


def _round_steps():
    return ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])


def colour(what: int | str) -> str:
    """A stand-in for a variable of the page: an arm's number, or a role."""
    return f"#01{_ROLES.index(what) if isinstance(what, str) else len(_ROLES) + what:04x}"


def _variable(found: re.Match) -> str:
    place = int(found[1], 16)
    return f"var(--{_ROLES[place] if place < len(_ROLES) else f'c{place - len(_ROLES)}'})"


def scatter(
    marks: Sequence[Mark],
    x_label: str,
    y_label: str,
    log_y: bool = False,
    size: tuple[int, int] = (1000, 430),
) -> str:
    """Labelled points; labels step aside until they touch neither each other nor a point, or are left out. "" without a
    point."""
    marks = [m for m in marks if math.isfinite(m.x) and math.isfinite(m.y) and (m.y > 0 or not log_y)]
    if not marks:
        return ""
    drawing = Drawing(f"{y_label} against {x_label}", size, x_label, y_label)
    axes = drawing.axes
    axes.set_xlim(*span([m.x for m in marks], 0.12))
    axes.set_ylim(*span([m.y for m in marks], 0.1, log_y))
    if log_y:
        drawing.log_y()
    for m in marks:
        edge, face = (colour(m.place), colour("card")) if m.hollow else (colour("card"), colour(m.place))
        look = {"marker": "s" if m.square else "o", "markersize": 11, "markerfacecolor": face}
        (point,) = axes.plot(
            [m.x],
            [m.y],
            linestyle="none",
            zorder=3,
            clip_on=False,
            markeredgecolor=edge,
            markeredgewidth=2.5 if m.hollow else 1.5,
            **look,
        )
        drawing.titled(point, m.title or m.label)
    _label(drawing, marks)
    return drawing.svg()


def _label(drawing: Drawing, marks: Sequence[Mark]) -> None:
    """Write each mark's label at the first place near it that is free, the lowest marks first; without one, nowhere."""
    figure, axes = drawing.figure, drawing.axes
    figure.draw_without_rendering()  # the axes are where they will be
    scale = 72 / figure.dpi
    spots = [axes.transData.transform((m.x, m.y)) * scale for m in marks]
    frame = axes.get_window_extent()
    left, low, right, high = (scale * v for v in (frame.x0, frame.y0, figure.bbox.width, figure.bbox.height))
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in spots]
    for m, (x, y) in sorted(zip(marks, spots), key=lambda pair: (pair[0].y, pair[0].x)):
        text = m.label if len(m.label) <= 26 else m.label[:25] + "…"
        width = 7.4 * len(text)
        steps = [step for out, up in _STEPS for step in ((11 + out, up), (-11 - out - width, up))]
        boxes = [(x + aside, y + up - 7, x + aside + width, y + up + 7) for aside, up in steps]
        free = (
            i
            for i, box in enumerate(boxes)
            if left <= box[0] and box[2] <= right and low <= box[1] and box[3] <= high
            if not any(_touch(box, other) for other in taken)
        )
        chosen = next(free, None)
        if chosen is None:
            continue  # hovering tells
        taken.append(boxes[chosen])
        aside, up = steps[chosen]
        line = {"arrowstyle": "-", "color": colour("soft"), "alpha": 0.5, "shrinkA": 1, "shrinkB": 0}
        axes.annotate(
            text,
            (m.x, m.y),
            xytext=(aside if aside > 0 else aside + width, up),
            textcoords="offset points",
            ha="left" if aside > 0 else "right",
            va="center_baseline",
            size=13,
            color=colour("ink"),
            parse_math=False,
            in_layout=False,
            arrowprops=line if abs(up) > 15 else None,
        )


def _touch(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def span(values: Sequence[float], air: float = 0.06, log: bool = False) -> tuple[float, float]:
    """Low and high of the values with some air around them; never empty."""
    low, high = min(values), max(values)
    if log:
        room = max((high / low) ** air, 1.1)
        return low / room, high * room
    room = (high - low) * air or abs(high) * air or 0.5
    return low - room, high + room


def number(value: float) -> str:
    """Short form of a tick or a value."""
    return f"{value:.6g}" if abs(value) < 1e4 else f"{value / 1e3:.4g}k"
