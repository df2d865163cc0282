"""`zeda evaluate report`: runs side by side, as JSON and as one HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ...config.arguments import parse, require
from ...durable_file import write_result
from ...errors import UserError, cut_short, one_line
from .choice import MARGIN, choose
from .figures import compare
from .page import MEANS, Cell, means, render, text_table
from .results import RunResult, read_run

TEACHER = "teacher"
"""The arm that others are compared with unless --teacher names another."""


@dataclass(frozen=True)
class ReportOptions:
    """Which runs, and where the report goes."""

    runs: str | None = None
    """Folders of runs, comma-separated."""

    output: str | None = None
    """Folder for benchmarks.json and benchmarks.html."""

    margin: float = MARGIN
    """Loss of accuracy that counts as none when a choice is made (0.02 is two points)."""

    teacher: str | None = None
    """Arm that the others are compared with: the static model's. Default: the one called `teacher`."""

    untrained: str | None = None
    """Arms, comma-separated, that were not trained, where neither run nor model tells: else they count as trained."""

    static: str | None = None
    """Arms, comma-separated, without zero experts, where neither run nor model tells: else they count as with some."""


def report(options: ReportOptions) -> dict:
    """Write both files, print the table and the choice; returns the report.

    Raises:
        UserError: no runs, two of one arm, or a folder that is no run.
    """
    require(options, "runs", "output")
    if not 0.0 <= options.margin <= 1.0:
        raise UserError(f"--margin {options.margin} must be from 0 to 1")
    made = make_report(
        _parts(options.runs),
        options.margin,
        options.teacher,
        _parts(options.untrained),
        _parts(options.static),
    )
    out = Path(options.output)
    write_result("--output", out / "benchmarks.json", json.dumps(made, indent=1) + "\n")
    write_result("--output", out / "benchmarks.html", render(made))
    print(format_table(made))
    print(f"\nreport: {out / 'benchmarks.html'}")
    return made


def make_report(
    folders: list[str],
    margin: float = MARGIN,
    teacher: str | None = None,
    untrained: Sequence[str] = (),
    static: Sequence[str] = (),
) -> dict:
    """`{"choice", "margin", "teacher", "benchmarks", "arms", "runs"}` of these runs' folders; arguments as the options.

    Raises `UserError` for a flag that names no arm, or contradicts what the arm's own files tell.
    """
    runs = [read_run(folder) for folder in folders]
    names = [run.arm for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--runs: two runs are of the arm {name}; name one otherwise (--arm)")
    if not runs:
        raise UserError("--runs names no folder")
    for flag, arms in (
        ("--teacher", [teacher] if teacher else []),
        ("--untrained", untrained),
        ("--static", static),
    ):
        for arm in arms:
            if arm not in names:
                raise UserError(
                    f"{flag} {cut_short(arm)}: no run is of this arm; there are {', '.join(names)}"
                )
    runs = [_told(run, "--untrained", untrained, "adapted_steps", 0) for run in runs]
    runs = [_told(run, "--static", static, "zero_experts", False) for run in runs]
    figures = compare(runs, teacher or TEACHER)
    about = [
        {"arm": run.arm, "folder": run.folder, "model": run.model, "environment": run.environment}
        for run in runs
    ]
    return {"choice": asdict(choose(figures, margin)), "margin": margin, **figures, "runs": about}


def _told(run: RunResult, flag: str, arms: Sequence[str], fact: str, value: object) -> RunResult:
    """The run with a fact that a flag tells of it, where nothing else does."""
    known = getattr(run.origin, fact)
    if run.arm not in arms or known == value:
        return run
    if known is not None:
        raise UserError(f"{flag} {run.arm}: its own files tell {fact} {known}; leave the flag out")
    return replace(run, origin=replace(run.origin, **{fact: value}))


def _parts(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def format_table(made: dict) -> str:
    """Arms and the choice as text for the terminal."""
    rows = [["arm", *MEANS]]
    rows += [[one_line(name), *map(_written, means(arm))] for name, arm in made["arms"].items()]
    shared = ", ".join(one["name"] for one in made["benchmarks"] if one["shared"]) or "no benchmark in common"
    note = f"(mean over: {shared}; in brackets 95% confidence)"
    return "\n".join([*text_table(rows), note, "", made["choice"]["sentence"]])


def _written(cell: Cell) -> str:
    return f"{cell.text} [{cell.note}]" if cell.note else cell.text.replace("–", "-")


def main(argv: list[str]) -> int:
    """Entry point."""
    report(parse(argv, {"report": ReportOptions}, prog="zeda evaluate report")["report"])
    return 0
