"""The report as one HTML page: no scripts, no external files, plots as inline SVG."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from markupsafe import Markup, escape

from zeda_megatron.evaluation.comparison.page import Cell, Heat, Row, cell, environment, heat, wide_and_narrow
from zeda_megatron.evaluation.comparison.plots import Mark
from zeda_megatron.evaluation.comparison.statistics import paired_p_value

from .finding import BAND, TIE, Finding, finding
from .legend import Arm, is_untrained, legend
from .plots import expert_plot, layer_plot, training_plots
from .skips import VARIABLES, correlations, skip_note, skip_tables

_BEST = {"kl_to_teacher": min, "ce": min, "top1_agreement": max, "exact_match": max}
"""Figures of which the best is bold."""


def render(report: dict, history: dict[str, list[dict]], order: list[str]) -> str:
    """HTML of a completed report (see `report.py`).

    Args:
        report: with every METRICS key present.
        history: training lines per arm.
        order: arm names in the order of the tables.
    """
    arms = legend([*order, *(name for name in history if name not in order)])
    metrics, teacher, found = (
        {name: report["arms"][name] for name in order},
        report["teacher"],
        finding(report),
    )
    signs = {name: _row(name, arm, report["arms"].get(name, {}), []) for name, arm in arms.items()}
    layers = {n: layer_plot(m.get("zero_share_by_layer") or [], arms[n].place) for n, m in metrics.items()}
    experts = {n: expert_plot(m.get("skipped_by_expert") or [], arms[n].place) for n, m in metrics.items()}
    training = training_plots(history, {name: arm.place for name, arm in arms.items()})
    kinds = _by_kind(metrics, "zero_share", "Zero share", "{:.2f}")
    kinds += _by_kind(metrics, "kl", "KL to the teacher", "{:.4f}")
    kinds += _by_kind({"teacher": teacher, **metrics}, "exact_match", "Exact answers", "{:.1%}")
    return (
        environment(Path(__file__).parent / "templates")
        .get_template("quickstart.html")
        .render(
            {
                "colours": [(arm.light, arm.dark) for arm in arms.values()],
                "sentence": _marked(found, arms),
                "caveat": found.caveat,
                "tiles": _tiles(report, found),
                "band": f"{BAND[0]:.0%} to {BAND[1]:.0%}",
                "tie": f"{TIE:.0%}",
                "results": _results(metrics, teacher, arms, found),
                "frontier": _frontier(metrics, arms),
                "training": [(title, [signs[n] for n in names], plot) for title, names, plot in training],
                "kinds": kinds,
                "skips": skip_tables(report, order),
                "skip_note": skip_note(report, order, found.ours),
                "variables": list(VARIABLES.values()),
                "correlations": correlations(report, order),
                "layers": {name: plot for name, plot in layers.items() if plot},
                "experts": {name: plot for name, plot in experts.items() if plot},
                "commands": report["commands"],
                "environment": {str(key): fact(value) for key, value in report["environment"].items()},
            }
        )
    )


def _marked(found: Finding, arms: dict[str, Arm]) -> Markup:
    """The headline with its arms in their colours."""
    names = {str(escape(n)): arms[n].place for n in (found.ours, found.baseline, found.best) if n}
    sentence = str(escape(found.sentence))
    if names:
        # One pass over the text, longest names first: no name is marked inside another or inside a tag.
        pattern = "|".join(re.escape(n) for n in sorted(names, key=len, reverse=True))
        sentence = re.sub(pattern, lambda m: f'<b class="c{names[m[0]]}">{m[0]}</b>', sentence)
    return Markup(sentence)


def _tiles(report: dict, found: Finding) -> list[tuple[str, str]]:
    name = found.ours or found.best
    if name is None:
        return []
    m, teacher = report["arms"][name], report["teacher"]
    tiles = [(f"{m['zero_share']:.1%}", f"of its routed picks {name} skips")]
    if m["top1_agreement"] is not None:
        tiles.append((f"{m['top1_agreement']:.1%}", "same next token as the teacher"))
    if m["ce"] is not None and teacher["ce"]:
        tiles.append(
            (f"{m['ce'] / teacher['ce'] - 1:+.2%}", f"cross-entropy: {teacher['ce']:.4f} to {m['ce']:.4f}")
        )
    if m["exact_match"] is not None and teacher["exact_match"] is not None:
        tiles.append((f"{m['exact_match']:.1%}", f"answered exactly; teacher {teacher['exact_match']:.1%}"))
    if m["adapt_seconds"] is not None:
        tokens = f", {count(m['adapt_tokens'])} tokens" if m["adapt_tokens"] else ""
        tiles.append((duration(m["adapt_seconds"]), f"to adapt{tokens}"))
    return tiles


def _results(metrics: dict[str, dict], teacher: dict, arms: dict[str, Arm], found: Finding) -> list[Row]:
    """All arms, teacher first; the winner's row is tinted."""
    half = [
        n for n, m in metrics.items() if m["zero_share"] is not None and BAND[0] <= m["zero_share"] <= BAND[1]
    ]
    top = {key: _best(metrics, half, key, pick) for key, pick in _BEST.items()}
    rows = [Row("teacher", "static model, every pick computed", _figures("teacher", teacher, teacher, {}))]
    for name, m in metrics.items():
        rows.append(_row(name, arms[name], m, _figures(name, m, teacher, top), chosen=name == found.best))
    return rows


def _row(name: str, arm: Arm, m: dict, cells: list[Cell], chosen: bool = False) -> Row:
    return Row(name, arm.note, cells, arm.place, arm.baseline, is_untrained(m), chosen)


def _figures(name: str, m: dict, teacher: dict, top: dict[str, str | None]) -> list[Cell]:
    rise = m["ce"] / teacher["ce"] - 1 if m is not teacher and m["ce"] is not None and teacher["ce"] else None
    spread = m.get("kl_to_teacher_std")
    best = {key: top.get(key) == name for key in _BEST}
    return [
        cell(m["kl_to_teacher"], "{:.4f}", f"± {spread:.4f}" if spread else "", best["kl_to_teacher"]),
        cell(m["zero_share"], "{:.3f}"),
        cell(m["ce"], "{:.4f}", top=best["ce"]),
        cell(rise, "{:+.2%}"),
        cell(m["top1_agreement"], "{:.3f}", top=best["top1_agreement"]),
        cell(m["exact_match"], "{:.1%}", _answers_note(m, teacher), best["exact_match"]),
        cell(m["expert_flops"], "{:.3f}"),
        cell(m["experts_loaded"], "{:.2f}"),
        cell(m["adapt_tokens"], count),
        cell(m["adapt_seconds"], duration),
        cell(m["trained_parameters"], count),
        cell(m["step_seconds"], "{:.2f} s"),
        cell(m["peak_memory_gib"], "{:.2f} GiB"),
    ]


def _answers_note(m: dict, teacher: dict) -> str:
    """95% interval of the exact answers, and the paired test against the teacher, where single answers are known."""
    if not m.get("exact_match_interval"):
        return ""
    low, high = m["exact_match_interval"]
    text = f"{low:.0%} to {high:.0%}"
    mine, theirs = m.get("answers"), teacher.get("answers")
    if m is not teacher and mine and theirs and len(mine) == len(theirs):
        text += f", p {paired_p_value([float(int(a) - int(b)) for a, b in zip(mine, theirs)]):.2f}"
    return text


def _best(metrics: dict, names: list[str], field: str, pick: Callable) -> str | None:
    known = [name for name in names if metrics[name][field] is not None]
    return pick(known, key=lambda name: metrics[name][field]) if len(known) > 1 else None


def _frontier(metrics: dict[str, dict], arms: dict[str, Arm]) -> list[Markup]:
    """Zero share against KL."""
    marks = []
    for name, m in metrics.items():
        x, y = m["zero_share"], m["kl_to_teacher"]
        if x is not None and y is not None:
            title = f"{name}: zero share {x:.3f}, KL {y:.4f}"
            marks.append(Mark(name, x, y, arms[name].place, arms[name].baseline, is_untrained(m), title))
    positive = [m.y for m in marks if m.y > 0]
    log = len(positive) > 1 and max(positive) / min(positive) > 3
    return wide_and_narrow(marks, "zero share (picks skipped)", "KL to the teacher", log)


def _by_kind(metrics: dict[str, dict], field: str, title: str, form: str) -> list[Heat]:
    cells = {
        n: {kind: v.get(field) for kind, v in (m.get("by_kind") or {}).items()} for n, m in metrics.items()
    }
    return heat(cells, sorted({kind for row in cells.values() for kind in row}), title, form)


def count(value: float) -> str:
    """1234567 -> 1.23 M"""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def fact(value) -> str:
    """A value of the environment as text."""
    if isinstance(value, list):
        return ", ".join(map(fact, value))
    if isinstance(value, dict):
        return ", ".join(f"{k} {fact(v)}" for k, v in value.items())
    return str(value)
