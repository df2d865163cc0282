"""Benchmarks: `python -m zeda_megatron.evaluation run | report | sandbox`, each with --help."""

from __future__ import annotations

import sys

from ..config.arguments import parse
from ..errors import UserError, run_main

USAGE = "usage: python -m zeda_megatron.evaluation run|report|sandbox [--help]"


def main(argv: list[str] | None = None) -> int:
    """Entry point: `run` asks a model, `report` compares runs, `sandbox` says which walls stand here."""
    argv = sys.argv[1:] if argv is None else argv
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command in ("-h", "--help"):
        print(f"{USAGE}\n\n{__doc__}")
        return 0
    if command == "run":
        from .answering.options import RunOptions
        from .answering.run import run

        run(parse(rest, {"run": RunOptions}, prog="evaluation run")["run"])
    elif command == "report":
        from .comparison.report import ReportOptions, report

        report(parse(rest, {"report": ReportOptions}, prog="evaluation report")["report"])
    elif command == "sandbox":
        from .sandbox.walls import find_walls

        walls = find_walls()
        print(walls.line())
        return 1 if walls.missing else 0
    else:
        raise UserError(f"{command or 'nothing'} is no command; {USAGE}")
    return 0


if __name__ == "__main__":
    run_main(main)
