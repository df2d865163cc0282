"""The report of a comparison: report.json for programs, report.html for people, a table for the terminal.

A report is `{"environment": {...}, "teacher": METRICS, "arms": {NAME: METRICS}, "commands": [...]}`. METRICS
has the keys below, None where a figure was not measured, and may have more:

* `by_kind`: {kind of text: {"ce", "kl", "zero_share", "exact_match"}}
* `zero_share_by_layer`: one share per layer
* `skipped_by_expert`: per layer and real expert, the share of its picks that were skipped
* `tokens`: which tokens skip, over the tokens that are scored; see `token_skips.py`
* `own_answers`: KL(student || teacher) on the student's own answers to held-out prompts (`evaluation.quality.measure`)
* `answers`: one digit per checkable question, 1 for right; `exact_match_interval`: 95%, low and high
* `kl_to_teacher_std`: spread over seeds; `seeds`: how many
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from zeda_megatron.durable_file import write_result
from zeda_megatron.evaluation.comparison.page import text_table

from .finding import finding
from .page import render

METRICS = (
    "ce",
    "kl_to_teacher",
    "top1_agreement",
    "exact_match",
    "zero_share",
    "expert_flops",
    "experts_loaded",
    "adapt_tokens",
    "adapt_seconds",
    "trained_parameters",
    "step_seconds",
    "peak_memory_gib",
)
KEYS = ("environment", "teacher", "arms", "commands")


def write_report(report: dict, history: dict[str, list[dict]], out_dir: str | Path) -> tuple[Path, Path]:
    """Write `report.json` and a self-contained `report.html` into `out_dir`; returns both paths.

    Args:
        report: as above; missing METRICS keys become None; so do NaN and infinity (JSON has neither).
        history: per trained arm the lines of its metrics.jsonl (`step`, `kd_loss`, `zero_share`, ...).
        out_dir: created if needed. Files are replaced in one move, never half written.

    Raises:
        ValueError: the report lacks one of its four keys or has another one.
        UserError: `out_dir` cannot be written.
    """
    report = complete(report)
    out = Path(out_dir)
    texts = {
        out / "report.json": _json(report),
        out / "report.html": render(report, _plain(history), sorted_arms(report)),
    }
    for path, text in texts.items():
        write_result("--out", path, text)
    return out / "report.json", out / "report.html"


def _json(report: dict) -> str:
    """Indented, but a list of numbers is one line."""
    text = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False)
    return re.sub(r"\[\s+([\d.,eE\s+\-nul]+?)\s+\]", _one_line, text) + "\n"


def _one_line(numbers: re.Match) -> str:
    return f"[{' '.join(numbers[1].split())}]"


def complete(report: dict) -> dict:
    """A copy with every METRICS key present and every number finite or None."""
    if set(report) != set(KEYS):
        raise ValueError(
            f"a report has exactly the keys {', '.join(KEYS)}; got {', '.join(map(str, report))}"
        )
    empty = dict.fromkeys(METRICS)
    return {
        "environment": _plain(report["environment"]),
        "teacher": {**empty, **_plain(report["teacher"])},
        "arms": {str(name): {**empty, **_plain(metrics)} for name, metrics in report["arms"].items()},
        "commands": [str(command) for command in report["commands"]],
    }


def sorted_arms(report: dict) -> list[str]:
    """Arm names, closest to the teacher first; arms without a KL last."""

    def key(name: str) -> tuple:
        kl = report["arms"][name].get("kl_to_teacher")
        return (kl is None, kl or 0.0, name)

    return sorted(report["arms"], key=key)


COLUMNS = (
    ("zero share", "zero_share", "{:.3f}"),
    ("expert FLOPs", "expert_flops", "{:.3f}"),
    ("loaded", "experts_loaded", "{:.2f}"),
    ("KL", "kl_to_teacher", "{:.4f}"),
    ("CE", "ce", "{:.4f}"),
    ("top-1", "top1_agreement", "{:.3f}"),
    ("exact", "exact_match", "{:.3f}"),
    ("tokens", "adapt_tokens", "{:,.0f}"),
    ("seconds", "adapt_seconds", "{:,.0f}"),
    ("trained", "trained_parameters", "{:,.0f}"),
    ("s/step", "step_seconds", "{:.2f}"),
    ("GiB", "peak_memory_gib", "{:.2f}"),
)


def format_table(report: dict) -> str:
    """The result table and the finding as plain text for the terminal."""
    report = complete(report)
    found = finding(report)
    rows = [["arm", *(title for title, _, _ in COLUMNS)]]
    for name in ("teacher", *sorted_arms(report)):
        metrics = report["teacher"] if name == "teacher" else report["arms"][name]
        cells = ["-" if metrics[key] is None else form.format(metrics[key]) for _, key, form in COLUMNS]
        rows.append([f"{name} *" if name == found.best else name, *cells])
    notes = [found.sentence, *([found.caveat] if found.caveat else [])]
    if found.best:
        notes.append(
            "(* lowest KL among the arms that skip about half; KL and CE in nats per token, held out; loaded: share of "
            "a layer's experts that 16 tokens decoded together need; GiB: most that a training process held)"
        )
    return "\n".join([*text_table(rows), "", *notes])


def _plain(value):
    """JSON-ready copy: numbers finite or None, numpy and torch scalars as Python numbers, paths as text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int) else str(value)
