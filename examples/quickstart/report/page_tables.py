"""Tables of the report page: results, and figures by kind of text; and how figures are written."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from zeda_megatron.evaluation.comparison.statistics import paired_p_value

from .finding import BAND, Finding
from .legend import Arm

_TITLES = ("KL to teacher", "zero share", "CE", "CE rise", "top-1", "exact", "expert FLOPs", "tokens", "time")


def results_table(report: dict, order: list[str], arms: dict[str, Arm], found: Finding) -> str:
    """All arms, teacher first, then in `order`; the winner's row is tinted."""
    metrics, teacher = report["arms"], report["teacher"]
    half = [name for name in order if within(metrics[name]["zero_share"])]
    top = {
        key: _best(metrics, half, key, pick)
        for key, pick in (("kl_to_teacher", min), ("ce", min), ("top1_agreement", max), ("exact_match", max))
    }
    rows = [_row("teacher", "static model, every pick computed", teacher, teacher, "teacher", "", {})]
    for name, arm in ((name, arms[name]) for name in order):
        kind = f"c{list(arms).index(name)}{' best' if name == found.best else ''}"
        rows.append(_row(name, arm.note, metrics[name], teacher, kind, key(arm), top))
    head = "".join(f"<th>{title}</th>" for title in _TITLES)
    return (
        f'<div class="scroll"><table><thead><tr><th>arm</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def heat_table(report: dict, order: list[str], field: str, title: str, form: str) -> str:
    """Arms by kinds of text, one `field` of `by_kind`, darker for more; empty without figures."""
    rows = {name: report["arms"][name] for name in order}
    if field == "exact_match":
        rows = {"teacher": report["teacher"], **rows}
    cells = {name: {k: v.get(field) for k, v in (m.get("by_kind") or {}).items()} for name, m in rows.items()}
    return heat_grid(cells, sorted({kind for row in cells.values() for kind in row}), title, form)


def heat_grid(cells: dict[str, dict], columns: list[str], title: str, form: str) -> str:
    """Rows by columns, darker for more; rows and columns without a figure are left out, all of them: empty."""
    cells = {name: row for name, row in cells.items() if any(v is not None for v in row.values())}
    columns = [c for c in columns if any(row.get(c) is not None for row in cells.values())]
    if not columns:
        return ""
    most = max(v for row in cells.values() for v in row.values() if v is not None) or 1.0
    head = "".join(f"<th>{breakable(column)}</th>" for column in columns)
    lines = (
        f"<tr><th>{breakable(name)}</th>{''.join(_heat_cell(row.get(c), most, form) for c in columns)}</tr>"
        for name, row in cells.items()
    )
    return (
        f'<div><h3>{title}</h3><div class="scroll"><table class="heat">'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></div>"
    )


def key(arm: Arm) -> str:
    """The little sign of an arm: square for baselines, hollow for untrained ones."""
    square, hollow = " square" if arm.baseline else "", "" if arm.trained else " hollow"
    return f'<span class="key{square}{hollow}"></span>'


def within(share: float | None) -> bool:
    """Whether a zero share counts as about half."""
    return share is not None and BAND[0] <= share <= BAND[1]


def breakable(name: str) -> str:
    """Escaped name that may wrap after an underscore."""
    return escape(name).replace("_", "_<wbr>")


def count(value: float | None) -> str:
    """1234567 -> 1.23 M"""
    if value is None:
        return "–"
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours."""
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _row(name: str, note: str, m: dict, teacher: dict, kind: str, sign: str, top: dict) -> str:
    rise = (
        m["ce"] / teacher["ce"] - 1 if name != "teacher" and m["ce"] is not None and teacher["ce"] else None
    )
    spread = m.get("kl_to_teacher_std")
    cells = [
        _cell(
            m["kl_to_teacher"],
            "{:.4f}",
            top.get("kl_to_teacher") == name,
            f'<span class="note">± {spread:.4f}</span>' if spread else "",
        ),
        _cell(m["zero_share"], "{:.3f}"),
        _cell(m["ce"], "{:.4f}", top.get("ce") == name),
        _cell(rise, "{:+.2%}"),
        _cell(m["top1_agreement"], "{:.3f}", top.get("top1_agreement") == name),
        _cell(m["exact_match"], "{:.1%}", top.get("exact_match") == name, _answers_note(m, teacher)),
        _cell(m["expert_flops"], "{:.3f}"),
        _cell(m["adapt_tokens"], count),
        _cell(m["adapt_seconds"], duration),
    ]
    label = f'<th scope="row">{sign}{breakable(name)}<span class="note">{escape(note)}</span></th>'
    return f'<tr class="{kind}">{label}{"".join(cells)}</tr>'


def _answers_note(m: dict, teacher: dict) -> str:
    """95% interval of the exact answers, and the paired test against the teacher, where single answers are known."""
    if not m.get("exact_match_interval"):
        return ""
    low, high = m["exact_match_interval"]
    text = f"{low:.0%} to {high:.0%}"
    mine, theirs = m.get("answers"), teacher.get("answers")
    if m is not teacher and mine and theirs and len(mine) == len(theirs):
        p = paired_p_value([float(int(a) - int(b)) for a, b in zip(mine, theirs)])
        text += f", p {p:.2f}"
    return f'<span class="note">{text}</span>'


def _cell(value: float | None, form: str | Callable[[float], str], best: bool = False, more: str = "") -> str:
    if value is None:
        return '<td class="gone">–</td>'
    text = form.format(value) if isinstance(form, str) else form(value)
    mark = ' class="top"' if best else ""
    return f"<td{mark}>{text}{more}</td>"


def _heat_cell(value: float | None, most: float, form: str) -> str:
    if value is None:
        return '<td class="gone">–</td>'
    strength = 0.04 + 0.56 * min(max(value / most, 0.0), 1.0) ** 1.5
    return f'<td style="--a:{strength:.2f}">{form.format(value)}</td>'


def _best(metrics: dict, names: list[str], field: str, pick: Callable) -> str | None:
    known = [name for name in names if metrics[name][field] is not None]
    return pick(known, key=lambda name: metrics[name][field]) if len(known) > 1 else None
