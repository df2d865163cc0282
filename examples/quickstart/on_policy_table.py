"""Prints the tables of docs/evidence/on_policy.md from a report: `python
examples/quickstart/on_policy_table.py REPORT.json`.

A test compares them with the page, letter for letter; the first one of another report with docs/evidence/glm.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from readme_table import figure, mean_of, token_table

ROUTINGS = {
    "NET": ("net_kl", "net"),
    "shared zero experts": ("zeda_stage1_kl", "zeda"),
    "paired zero experts": ("paired_kl", "paired"),
}
PARTS = {
    "stage 1 (100 steps)": None,
    "+ stage 2, reverse KL (40 steps)": "stage2",
    "+ stage 2, sampled reverse KL, the paper's (40 steps)": "stage2_sampled",
    "+ stage 1 for as long (150 steps)": "more",
}


def stages(report: dict) -> str:
    """What each routing gains by stage 2, and by stage 1 for about the same time."""
    lines = [
        "| | KL to teacher, held-out text | KL from teacher, own answers | exact match | skipped | seconds |",
        "|---" * 6 + "|",
    ]
    for routing, (start, short) in ROUTINGS.items():
        first = report["arms"].get(start)
        if first is None:
            continue
        lines.append(f"| **{routing}** | | | | | |")
        for label, end in PARTS.items():
            m = first if end is None else report["arms"].get(f"{short}_{end}")
            if m is not None:
                seconds = m["adapt_seconds"] - (first["adapt_seconds"] if end else 0.0)
                lines.append(f"| {label} | {_cells(m)} | {seconds:.0f} |")
    return "\n".join(lines)


def _cells(m: dict) -> str:
    m = {"own_reverse_kl": m["own_answers"]["reverse_kl"], **m}
    right, share = mean_of(m, "exact_match"), mean_of(m, "zero_share")
    return f"{figure(m, 'kl_to_teacher')} | {figure(m, 'own_reverse_kl')} | {right:.1%} | {share:.1%}"


if __name__ == "__main__":
    found = json.loads(Path(sys.argv[1]).read_text())
    print(f"{stages(found)}\n\n{token_table(found)}")
