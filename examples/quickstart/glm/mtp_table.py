"""The table of docs/evidence/glm.md from what mtp.sh has measured: python
examples/quickstart/glm/mtp_table.py WORK_DIR"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from zeda_megatron.text_table import markdown_table

ROWS = (
    ("teacher", "fitted", "teacher"),
    ("teacher, its head trained 100 steps more", "longer", "teacher"),
    ("fitted, untrained; old head", "fitted", "student, old head"),
    ("distilled without the head; old head", "without", "student, old head"),
    ("distilled with the head; old head", "with", "student, old head"),
    ("**distilled with the head; its own head**", "with", "student, its own head"),
)
"""What a line is called, the file it is from, and who drafts there."""
HEAD = (
    "",
    "zero share",
    "accepted on text",
    "KL(model, draft)",
    "accepted on own answers",
    "tokens a step",
    "of teacher's",
)


def line(name: str, found: dict, teacher: dict) -> list[str]:
    """One row; the last column compares tokens a step with the teacher's."""
    own = found["own_answers"]
    part = own["accepted_length"] / teacher["own_answers"]["accepted_length"]
    shares = [f"{found[key]:.1%}" for key in ("zero_share", "acceptance")]
    return [
        name,
        *shares,
        f"{found['kl']:.3f}",
        f"{own['acceptance']:.1%}",
        f"{own['accepted_length']:.3f}",
        f"{part:.1%}",
    ]


def main() -> None:
    work = Path(sys.argv[1])
    measured = {file: json.loads((work / f"{file}.json").read_text()) for _, file, _ in ROWS}
    teacher = measured["fitted"]["teacher"]
    rows = [line(name, measured[file][who], teacher) for name, file, who in ROWS]
    print("\n".join(markdown_table(HEAD, rows)))


if __name__ == "__main__":
    main()
