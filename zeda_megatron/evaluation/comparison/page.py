"""The comparison as one HTML page: no scripts, no external files."""

from __future__ import annotations

from html import escape

from .. import svg
from ..legend import Arm, legend
from ..page_style import stylesheet
from ..page_tables import breakable, heat_grid, key
from .results import TEACHER

_TITLES = (
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
RULE = (
    "The rule: an arm is good if its 95% interval rules out a loss of more than {margin}. Among good arms that save 5% "
    "of the expert FLOPs or more, the one that saves most; where several save within 3 points of it, the one that "
    "takes least work (none, stage 1, more), then the most accurate."
)


def render(made: dict) -> str:
    """HTML of `report.make_report`'s result."""
    arms = legend(list(made["arms"]))
    choice = made["choice"]
    parts = [
        f'<h1>ZEDA: benchmarks</h1><p class="lead">{escape(choice["sentence"])}</p>',
        _section("Arms", _about(made), _arms_table(made, arms)),
        _section(
            "What is saved, and what it costs",
            "Further left computes fewer expert FLOPs, further up answers better.",
            _frontier(made, arms),
        ),
        _section(
            "By benchmark",
            "Darker is more.",
            f'<div class="panels one">{_accuracies(made)}{_shares(made)}</div>',
        ),
        _section(
            "Every figure",
            "Intervals: 95%, Wilson's for accuracies (one mean per question), Student's for paired differences. p: "
            "paired sign-flip test on the questions both have answered. Length: median tokens.",
            _details(made, arms),
        ),
        _section("By kind of question", "Accuracy.", _kinds(made)),
        _section(
            "How to get these figures",
            escape(RULE.format(margin=f"{100 * made['margin']:g} points")),
            _origin(made),
        ),
        "<footer>Accuracy: mean over questions, benchmarks counting alike. FLOPs and weights of experts: shares of the "
        "teacher's. Length: tokens of an answer. "
        "Zero share: routed slots that chose a zero expert or that a rule skipped, of all routed slots.</footer>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>ZEDA benchmarks</title><style>{stylesheet(arms)}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _about(made: dict) -> str:
    shared = [escape(one["title"]) for one in made["benchmarks"] if one["shared"]]
    return f"Mean over {', '.join(shared)}." if shared else "No benchmark was finished by all arms."


def _arms_table(made: dict, arms: dict[str, Arm]) -> str:
    rows = []
    for place, (name, figures) in enumerate(made["arms"].items()):
        arm, best = arms[name], name == made["choice"]["arm"]
        kind = "teacher" if name == TEACHER else f"c{place}{' best' if best else ''}"
        sign = "" if name == TEACHER else key(arm)
        note = "static model, every pick computed" if name == TEACHER else arm.note
        cells = (
            interval(figures["accuracy"]),
            interval(figures["difference"], "{:+.1f}"),
            p_value(figures["p_value"]),
            number(figures["zero_share"], "{:.1%}"),
            number(figures["expert_flops"], "{:.1%}"),
            number(figures["total_flops"], "{:.1%}"),
            number(figures["expert_weights"], "{:.0%}"),
            number(figures["tokens_per_second"], "{:,.0f}"),
            number(figures["answer_tokens"], "{:,.0f}"),
        )
        rows.append(
            f'<tr class="{kind}"><th>{sign}{breakable(name)}<span class="note">{escape(note)}</span></th>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    head = "".join(f"<th>{title}</th>" for title in _TITLES)
    return _table(f"<tr><th>arm</th>{head}</tr>", rows)


def _details(made: dict, arms: dict[str, Arm]) -> str:
    titles = ("asked", "each", "accuracy", "to teacher", "p", "zero share", "cut off", "tokens/s", "length")
    head = "".join(f"<th>{title}</th>" for title in titles)
    rows = []
    for benchmark in made["benchmarks"]:
        for place, (name, figures) in enumerate(made["arms"].items()):
            row = figures["benchmarks"].get(benchmark["name"])
            if row is None:
                continue
            asked = f"{row['questions']}" + ("" if row["complete"] else f" of {row['asked']}, unfinished")
            cells = (
                asked,
                str(row["samples"]),
                interval(row["accuracy"]),
                interval(row["difference"], "{:+.1f}"),
                p_value(row["p_value"]),
                number(row["zero_share"], "{:.1%}"),
                number(row["cut_off"], "{:.0%}"),
                number(row["tokens_per_second"], "{:,.0f}"),
                number(row["answer_tokens_median"], "{:,.0f}"),
            )
            sign, title = "" if name == TEACHER else key(arms[name]), escape(benchmark["title"])
            rows.append(
                f'<tr class="c{place}"><th>{sign}{breakable(name)}<span class="note">{title}</span></th>'
                + "".join(f"<td>{cell}</td>" for cell in cells)
                + "</tr>"
            )
    return _table(f"<tr><th>arm</th>{head}</tr>", rows)


def _frontier(made: dict, arms: dict[str, Arm]) -> str:
    marks = []
    for place, (name, figures) in enumerate(made["arms"].items()):
        if figures["accuracy"] is None or figures["expert_flops"] is None:
            continue
        x, y, arm = figures["expert_flops"], figures["accuracy"]["value"], arms[name]
        title = f"{name}: expert FLOPs {x:.1%}, accuracy {y:.1%}"
        marks.append(svg.Mark(name, x, y, place, arm.baseline, not arm.trained, title))
    labels = ("expert FLOPs, share of the teacher's", "accuracy")
    wide, narrow = (svg.scatter(marks, *labels, size=size) for size in ((1000, 430), (400, 400)))
    return wide and f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'


def _accuracies(made: dict) -> str:
    columns = [one["name"] for one in made["benchmarks"]]
    cells = {
        name: {n: row["accuracy"]["value"] for n, row in figures["benchmarks"].items() if row["accuracy"]}
        for name, figures in made["arms"].items()
    }
    return heat_grid(cells, columns, "Accuracy", "{:.1%}")


def _shares(made: dict) -> str:
    columns = [one["name"] for one in made["benchmarks"]]
    cells = {
        name: {n: row["zero_share"] for n, row in figures["benchmarks"].items()}
        for name, figures in made["arms"].items()
        if name != TEACHER
    }
    return heat_grid(cells, columns, "Zero share", "{:.1%}")


def _kinds(made: dict) -> str:
    cells = {
        name: {
            kind: value for row in figures["benchmarks"].values() for kind, value in row["by_kind"].items()
        }
        for name, figures in made["arms"].items()
    }
    grid = heat_grid(cells, sorted({kind for row in cells.values() for kind in row}), "", "{:.1%}")
    return grid and f'<div class="panels one">{grid}</div>'


def _origin(made: dict) -> str:
    folders = ",".join(run["folder"] for run in made["runs"])
    command = f"zeda evaluate report --runs {folders} --output DIR --margin {made['margin']}"
    facts = "".join(
        f"<dt>{escape(run['arm'])}</dt><dd>{escape(run['model'])}; "
        f"{escape(', '.join(f'{name} {value}' for name, value in run['environment'].items()))}</dd>"
        for run in made["runs"]
    )
    return f"<pre>{escape(command)}</pre><dl>{facts}</dl>"


def interval(estimate: dict | None, form: str = "{:.1f}") -> str:
    """A percentage with its interval beneath."""
    if estimate is None:
        return '<span class="gone">–</span>'
    value, low, high = (form.format(100 * estimate[part]) for part in ("value", "low", "high"))
    return f'{value}<span class="note">{low} to {high}</span>'


def number(value: float | None, form: str) -> str:
    """A number, or a dash."""
    return '<span class="gone">–</span>' if value is None else form.format(value)


def p_value(value: float | None) -> str:
    """Three digits, or that it is less."""
    return "&lt;0.001" if value is not None and value < 0.001 else number(value, "{:.3f}")


def _table(head: str, rows: list[str]) -> str:
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _section(title: str, sub: str, body: str) -> str:
    return f'<section><h2>{title}</h2><p class="sub">{sub}</p>{body}</section>' if body else ""
