"""Prints the result table of a report as Markdown: `python examples/quickstart/readme_table.py REPORT.json`.

The README's table is this output for results/report.json, letter for letter; a test compares them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

LABELS = {
    "static_topk_half": "top-k halved",
    "dynamic_skipping": "Dynamic Skipping, tuned to 50%",
    "top_p": "top-p, tuned to 50%",
    "injected_untrained": "zero rows injected",
    "net_kl": "NET: top-k halved + KL",
    "zeda_stage1_ce": "ZEDA stage 1, CE (paper)",
    "zeda_stage1_kl": "ZEDA stage 1, KL (default)",
}


def markdown(report: dict) -> str:
    """The table: the teacher, then untrained arms, then trained ones, each by KL."""
    head = "| | held-out CE | KL to teacher | top-1 agreement | exact match | experts skipped |"
    lines = [head, "|---|---|---|---|---|---|", _line("teacher (static)", report["teacher"])]
    arms = {name: report["arms"][name] for name in LABELS if name in report["arms"]}
    for trained in (False, True):
        group = [name for name in arms if bool(arms[name]["adapt_tokens"]) == trained]
        for name in sorted(group, key=lambda name: arms[name]["kl_to_teacher"]):
            label = LABELS[name] + (", untrained" if not trained else "")
            lines.append(_line(label, arms[name]))
    return "\n".join(lines)


def _line(label: str, m: dict) -> str:
    ce, kl = f"{m['ce']:.4f}", f"{m['kl_to_teacher']:.4f}"
    if m.get("seeds"):
        ce = f"{m['ce_mean']:.4f} ± {m['ce_std']:.4f}"
        kl = f"{m['kl_to_teacher_mean']:.4f} ± {m['kl_to_teacher_std']:.4f}"
    return f"| {label} | {ce} | {kl} | {m['top1_agreement']:.1%} | {m['exact_match']:.1%} | {m['zero_share']:.1%} |"


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
