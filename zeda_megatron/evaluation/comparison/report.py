"""`zeda evaluate report`: runs side by side, as JSON and as one HTML page."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ...config.arguments import parse
from ...durable_file import write_result
from ...errors import UserError, one_line
from .choice import MARGIN, choose
from .figures import compare
from .page import render
from .results import read_run


@dataclass(frozen=True)
class ReportOptions:
    """Which runs, and where the report goes."""

    runs: str | None = None
    """Folders of runs, comma-separated. The static model's run must have been made with `--arm teacher`."""

    output: str | None = None
    """Folder for benchmarks.json and benchmarks.html."""

    margin: float = MARGIN
    """Loss of accuracy that counts as none when a choice is made (0.02 is two points)."""


def report(options: ReportOptions) -> dict:
    """Write both files, print the table and the choice; returns the report.

    Raises:
        UserError: no runs, two of one arm, or a folder that is no run.
    """
    for flag, value in (("--runs", options.runs), ("--output", options.output)):
        if not value:
            raise UserError(f"{flag} is missing")
    if not 0.0 <= options.margin <= 1.0:
        raise UserError(f"--margin {options.margin} must be from 0 to 1")
    made = make_report([part.strip() for part in options.runs.split(",") if part.strip()], options.margin)
    out = Path(options.output)
    write_result("--output", out / "benchmarks.json", json.dumps(made, indent=1) + "\n")
    write_result("--output", out / "benchmarks.html", render(made))
    print(format_table(made))
    print(f"\nreport: {out / 'benchmarks.html'}")
    return made


def make_report(folders: list[str], margin: float = MARGIN) -> dict:
    """`{"choice", "margin", "benchmarks", "arms", "runs"}` of these runs' folders."""
    runs = [read_run(folder) for folder in folders]
    names = [run.arm for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--runs: two runs are of the arm {name}; name one otherwise (--arm)")
    if not runs:
        raise UserError("--runs names no folder")
    figures = compare(runs)
    about = [
        {"arm": run.arm, "folder": run.folder, "model": run.model, "environment": run.environment}
        for run in runs
    ]
    return {"choice": asdict(choose(figures, margin)), "margin": margin, **figures, "runs": about}


_COLUMNS = (
    ("accuracy", lambda arm: _percent(arm["accuracy"])),
    ("difference", lambda arm: _gap(arm["difference"])),
    ("p", lambda arm: _p(arm["p_value"])),
    ("zero share", lambda arm: _share(arm["zero_share"])),
    ("expert FLOPs", lambda arm: _share(arm["expert_flops"])),
    ("weights", lambda arm: _share(arm["expert_weights"])),
    ("tokens/s", lambda arm: "-" if arm["tokens_per_second"] is None else f"{arm['tokens_per_second']:,.0f}"),
    ("answer", lambda arm: "-" if arm["answer_tokens"] is None else f"{arm['answer_tokens']:,.0f}"),
)


def format_table(made: dict) -> str:
    """Arms and the choice as text for the terminal."""
    rows = [["arm", *(title for title, _ in _COLUMNS)]]
    rows += [[one_line(name), *(cell(arm) for _, cell in _COLUMNS)] for name, arm in made["arms"].items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
        for row in rows
    ]
    shared = ", ".join(one["name"] for one in made["benchmarks"] if one["shared"]) or "no benchmark in common"
    note = f"(mean over: {shared}; in brackets 95% confidence)"
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], note, "", made["choice"]["sentence"]])


def _percent(estimate: dict | None) -> str:
    if estimate is None:
        return "-"
    return f"{100 * estimate['value']:.1f} [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"


def _gap(estimate: dict | None) -> str:
    if estimate is None:
        return "-"
    return f"{100 * estimate['value']:+.1f} [{100 * estimate['low']:+.1f}, {100 * estimate['high']:+.1f}]"


def _p(value: float | None) -> str:
    return "-" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def main(argv: list[str]) -> int:
    """Entry point."""
    report(parse(argv, {"report": ReportOptions}, prog="zeda evaluate report")["report"])
    return 0
