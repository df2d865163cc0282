"""The comparison as one HTML page: no scripts, no external files. Its templates and tables serve other pages too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from .choice import is_baseline, is_untrained
from .plots import Mark, scatter

COLOURS = (
    *(("#d9480f", "#ff922b"), ("#1864ab", "#4dabf7"), ("#2b8a3e", "#69db7c"), ("#6741d9", "#b197fc")),
    *(("#c2255c", "#f783ac"), ("#0c8599", "#3bc9db"), ("#99752b", "#d0a94f"), ("#495057", "#ced4da")),
)
"""Of the arms, on a light page and on a dark one."""

MEANS = (
    "accuracy",
    "to teacher",
    "p",
    "zero share",
    "expert FLOPs",
    "all FLOPs",
    "weights",
    "tokens/s",
    "length",
)


@dataclass(frozen=True)
class Cell:
    """A figure of a table, as text."""

    text: str
    note: str = ""
    """A second line."""
    top: bool = False
    """Best of its column."""


@dataclass(frozen=True)
class Row:
    """An arm's line in a table."""

    name: str
    note: str
    cells: list[Cell]
    place: int | None = None
    """Number of its colour; None for the teacher, which has no sign."""
    square: bool = False
    hollow: bool = False
    chosen: bool = False


@dataclass(frozen=True)
class Heat:
    """Rows by columns, darker for more: each row holds (text, strength) or None."""

    title: str
    columns: list[str]
    rows: dict[str, list[tuple[str, float] | None]] = field(default_factory=dict)


def environment(*folders: Path) -> Environment:
    """Templates of these folders and of this one; what they are given is escaped."""
    places = [*folders, Path(__file__).parent / "templates"]
    made = Environment(
        loader=FileSystemLoader(places),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["breakable"] = lambda name: Markup(str(escape(name)).replace("_", "_<wbr>"))
    return made


def render(made: dict) -> str:
    """HTML of `report.make_report`'s result."""
    places = {name: place for place, name in enumerate(made["arms"])}
    folders = ",".join(run["folder"] for run in made["runs"])
    command = f"zeda evaluate report --runs {folders} --output DIR --margin {made['margin']}"
    arms = [
        _row(made, name, place, _told(made, name), means(made["arms"][name]))
        for name, place in places.items()
    ]
    return (
        environment()
        .get_template("benchmarks.html")
        .render(
            {
                "colours": [COLOURS[place % len(COLOURS)] for place in places.values()],
                "choice": made["choice"]["sentence"],
                "shared": [one["title"] for one in made["benchmarks"] if one["shared"]],
                "titles": MEANS,
                "arms": arms,
                "frontier": _frontier(made, places),
                "by_benchmark": _heats(made),
                "details": _details(made, places),
                "kinds": _kinds(made),
                "margin": f"{100 * made['margin']:g}",
                "command": f"{command} --teacher {made['teacher']}",
                "runs": made["runs"],
            }
        )
    )


def _row(made: dict, name: str, place: int, note: str, cells: list[Cell]) -> Row:
    arm, is_teacher = made["arms"][name], name == made["teacher"]
    signs = {} if is_teacher else {"place": place, "square": is_baseline(arm), "hollow": is_untrained(arm)}
    return Row(name, note, cells, **signs, chosen=name == made["choice"]["arm"] and not is_teacher)


def _told(made: dict, name: str) -> str:
    """What an arm is, in words."""
    if name == made["teacher"]:
        return "what the others are compared to"
    arm = made["arms"][name]
    has = {True: "zero experts", False: "no zero experts", None: "zero experts unless --static tells"}
    steps = arm["adapted_steps"]
    trained = (
        "trained, for how long is not told"
        if steps is None
        else f"{steps:,} steps"
        if steps
        else "not trained"
    )
    return f"{has[arm['zero_experts']]}, {trained}"


def means(arm: dict) -> list[Cell]:
    """An arm's figures over the shared benchmarks, in the order of `MEANS`."""
    return [
        interval(arm["accuracy"]),
        interval(arm["difference"], "{:+.1f}"),
        p_value(arm["p_value"]),
        *(cell(arm[key], "{:.1%}") for key in ("zero_share", "expert_flops", "total_flops")),
        cell(arm["expert_weights"], "{:.0%}"),
        cell(arm["tokens_per_second"], "{:,.0f}"),
        cell(arm["answer_tokens"], "{:,.0f}"),
    ]


def _details(made: dict, places: dict[str, int]) -> list[Row]:
    found = []
    for benchmark in made["benchmarks"]:
        for name, place in places.items():
            row = made["arms"][name]["benchmarks"].get(benchmark["name"])
            if row is not None:
                found.append(_row(made, name, place, benchmark["title"], _figures(row)))
    return found


def _figures(row: dict) -> list[Cell]:
    return [
        Cell(f"{row['questions']}" + ("" if row["complete"] else f" of {row['asked']}, unfinished")),
        Cell(str(row["samples"])),
        interval(row["accuracy"]),
        interval(row["difference"], "{:+.1f}"),
        p_value(row["p_value"]),
        cell(row["zero_share"], "{:.1%}"),
        cell(row["cut_off"], "{:.0%}"),
        cell(row["tokens_per_second"], "{:,.0f}"),
        cell(row["answer_tokens_median"], "{:,.0f}"),
    ]


def _frontier(made: dict, places: dict[str, int]) -> list[Markup]:
    marks = []
    for name, place in places.items():
        arm = made["arms"][name]
        if arm["accuracy"] is not None and arm["expert_flops"] is not None:
            x, y = arm["expert_flops"], arm["accuracy"]["value"]
            title = f"{name}: expert FLOPs {x:.1%}, accuracy {y:.1%}"
            marks.append(Mark(name, x, y, place, is_baseline(arm), is_untrained(arm), title))
    return wide_and_narrow(marks, "expert FLOPs, share of the teacher's", "accuracy")


def wide_and_narrow(marks: list[Mark], x_label: str, y_label: str, log_y: bool = False) -> list[Markup]:
    """A scatter plot for wide windows and one for narrow ones; nothing without marks."""
    sizes = ((1000, 430), (400, 400)) if marks else ()
    return [Markup(scatter(marks, x_label, y_label, log_y, size)) for size in sizes]


def _heats(made: dict) -> list[Heat]:
    def cells(figure: Callable[[dict], float | None]) -> dict:
        return {
            name: {n: figure(row) for n, row in arm["benchmarks"].items()}
            for name, arm in made["arms"].items()
        }

    columns = [one["name"] for one in made["benchmarks"]]
    shares = cells(lambda row: row["zero_share"])
    shares.pop(made["teacher"], None)
    right = cells(lambda row: row["accuracy"] and row["accuracy"]["value"])
    return [*heat(right, columns, "Accuracy", "{:.1%}"), *heat(shares, columns, "Zero share", "{:.1%}")]


def _kinds(made: dict) -> list[Heat]:
    cells = {
        name: {kind: v for row in arm["benchmarks"].values() for kind, v in row["by_kind"].items()}
        for name, arm in made["arms"].items()
    }
    return heat(cells, sorted({kind for row in cells.values() for kind in row}), "", "{:.1%}")


def heat(cells: Mapping[str, Mapping[str, Any]], columns: Iterable[str], title: str, form: str) -> list[Heat]:
    """One heat table; rows and columns without a figure are left out, all of them: none."""
    rows = {name: row for name, row in cells.items() if any(v is not None for v in row.values())}
    kept = [c for c in columns if any(row.get(c) is not None for row in rows.values())]
    if not kept:
        return []
    most = max(v for row in rows.values() for v in row.values() if v is not None) or 1.0

    def shown(value: float | None) -> tuple[str, float] | None:
        return (
            None
            if value is None
            else (form.format(value), 0.04 + 0.56 * min(max(value / most, 0.0), 1.0) ** 1.5)
        )

    return [Heat(title, kept, {name: [shown(row.get(c)) for c in kept] for name, row in rows.items()})]


def interval(estimate: dict | None, form: str = "{:.1f}") -> Cell:
    """A percentage with its interval beneath."""
    if estimate is None:
        return Cell("–")
    value, low, high = (form.format(100 * estimate[part]) for part in ("value", "low", "high"))
    return Cell(value, f"{low} to {high}")


def cell(value: float | None, form: str | Callable[[float], str], note: str = "", top: bool = False) -> Cell:
    """A number, or a dash."""
    if value is None:
        return Cell("–")
    return Cell(form.format(value) if isinstance(form, str) else form(value), note, top)


def p_value(value: float | None) -> Cell:
    """Three digits, or that it is less."""
    return Cell("<0.001") if value is not None and value < 0.001 else cell(value, "{:.3f}")


def text_table(rows: list[list[str]]) -> list[str]:
    """Lines of a table: a head, a rule, then a line a row; all but the first column flush right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
