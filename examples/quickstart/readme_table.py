"""Prints the result tables of a report as Markdown: `python examples/quickstart/readme_table.py REPORT.json`.

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
    "paired_untrained": "silent paired zero experts, fitted",
    "low_rank_untrained": "zero experts that wake up, fitted",
    "net_kl": "NET: top-k halved + KL",
    "net_matched_kl": "NET + KL + hidden states",
    "zeda_stage1_ce": "ZEDA stage 1, CE (paper)",
    "zeda_stage1_kl": "ZEDA stage 1, KL",
    "zeda_target_matched_kl": "ZEDA stage 1, KL + hidden states",
    "paired_kl": "silent paired zero experts + KL",
    "paired_matched_kl": "silent paired zero experts + KL + hidden states",
    "low_rank_matched_kl": "**zero experts that wake up + KL + hidden states**",
    "logw_threshold_kl": "threshold on the routing weight + KL",
    "beam_kl": "learned mask (BEAM-like) + KL",
    "paired_trained_kl": "silent paired zero experts, head trained too + KL",
    "adamoe": "null experts, AdaMoE's loss + KL",
}
FRONTIER = {
    "NET": {"25%": "net_kl_25", "50%": "net_kl", "75%": "net_kl_75"},
    "shared zero experts": {
        "25%": "zeda_stage1_kl_25",
        "50%": "zeda_stage1_kl",
        "62%": "zeda_stage1_kl_62",
        "75%": "zeda_stage1_kl_75",
    },
    "silent paired zero experts": {
        "25%": "paired_kl_25",
        "50%": "paired_kl",
        "62%": "paired_kl_62",
        "75%": "paired_kl_75",
    },
    "the same, waking up, hidden states matched": {
        "25%": "low_rank_matched_kl_25",
        "50%": "low_rank_matched_kl",
        "62%": "low_rank_matched_kl_62",
        "75%": "low_rank_matched_kl_75",
    },
    "NET, trained for k = 1 to 4": {
        "25%": "net_range_kl_dial_25",
        "50%": "net_range_kl",
        "75%": "net_range_kl_dial_75",
    },
    "shared, trained at 50%, dial turned": {
        "25%": "zeda_stage1_kl_dial_25",
        "50%": "zeda_stage1_kl",
        "62%": "zeda_stage1_kl_dial_62",
        "75%": "zeda_stage1_kl_dial_75",
    },
    "paired, trained at 50%, dial turned": {
        "25%": "paired_kl_dial_25",
        "50%": "paired_kl",
        "62%": "paired_kl_dial_62",
        "75%": "paired_kl_dial_75",
    },
    "paired, trained for 0-75%, dial turned": {
        "25%": "paired_range_kl_dial_25",
        "50%": "paired_range_kl",
        "62%": "paired_range_kl_dial_62",
        "75%": "paired_range_kl_dial_75",
    },
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


def frontier(report: dict) -> str:
    """KL at other shares, each with the share that was really skipped; all distilled with the KL loss."""
    shares = ("25%", "50%", "62%", "75%")
    lines = ["| KL to teacher (skipped) | " + " | ".join(shares) + " |", "|---" * 5 + "|"]
    for label, names in FRONTIER.items():
        cells = [_cell(report["arms"].get(names.get(share, ""))) for share in shares]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


ABLATIONS = (
    ("effect on the answer (default)", "paired_untrained", "paired_kl"),
    ("effect, head trained too", "", "paired_trained_kl"),
    ("effect, every layer skips half", "paired_layer_untrained", "paired_layer_kl"),
    ("norm of the output", "paired_norm_untrained", "paired_norm_kl"),
    ("norm over the residual stream's", "", "paired_norm_residual_kl"),
    ("no head: routing weight alone", "", "logw_threshold_kl"),
    ("learned from an open start (BEAM-like)", "", "beam_kl"),
)


def ablations(report: dict) -> str:
    """What decides a pick, at 50%: KL when only fitted, KL and exact match after 100 steps."""
    lines = ["| a pick is decided by | fitted only: KL (skipped) | distilled: KL (skipped) | exact match |"]
    lines.append("|---" * 4 + "|")
    for label, untrained, trained in ABLATIONS:
        m = report["arms"].get(trained)
        cells = [
            _cell(report["arms"].get(untrained)),
            _cell(m),
            f"{mean_of(m, 'exact_match'):.1%}" if m else "",
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


BUDGETS = {
    "paired zero experts": "paired_kl",
    "paired, head trained too": "paired_trained_kl",
    "learned mask (BEAM-like), rate 0.03": "beam_kl",
    "learned mask (BEAM-like), rate 0.1": "beam_kl_lr0.1",
    "shared zero experts": "zeda_stage1_kl",
    "NET": "net_kl",
}


def budgets(report: dict) -> str:
    """The arms at 50% after four times the steps."""
    lines = [
        "| KL to teacher (skipped) | 100 steps | 400 steps | exact match, 100 | exact match, 400 |",
        "|---" * 5 + "|",
    ]
    for label, name in BUDGETS.items():
        arms = [report["arms"].get(name), report["arms"].get(f"{name}_4x")]
        right = [f"{mean_of(m, 'exact_match'):.1%}" if m else "" for m in arms]
        lines.append(f"| {label} | " + " | ".join([*map(_cell, arms), *right]) + " |")
    return "\n".join(lines)


RATES = {
    "learned mask (BEAM-like)": {
        "0.01": "beam_kl_lr0.01",
        "0.03": "beam_kl",
        "0.1": "beam_kl_lr0.1",
        "0.3": "beam_kl_lr0.3",
    },
    "fitted head, trained on": {
        "0.0005": "paired_trained_kl",
        "0.002": "paired_trained_kl_lr2e-3",
        "0.015": "paired_trained_kl_lr0.015",
        "0.05": "paired_trained_kl_lr0.05",
    },
}


def rates(report: dict) -> str:
    """What the learning rate of a head that trains does, one seed each; the other weights have 5e-4."""
    columns = sorted({rate for arms in RATES.values() for rate in arms}, key=float)
    lines = ["| KL to teacher, by the head's learning rate | " + " | ".join(columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for label, arms in RATES.items():
        cells = []
        for rate in columns:
            m = report["arms"].get(arms.get(rate, ""))
            first = m["runs"][0] if m and m.get("runs") else m
            cells.append(f"{first['kl_to_teacher']:.4f}" if first else "")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


SKIPPING = {
    "zeda_stage1_kl": "shared zero experts, stage 1",
    "zeda_stage2": "shared zero experts, stages 1 and 2",
    "paired_kl": "paired zero experts",
    "dynamic_skipping": "Dynamic Skipping",
    "top_p": "top-p",
}
"""Arms whose tokens may skip differently."""


def token_table(report: dict) -> str:
    """Which tokens skip: Spearman's r of a token's skipped share; empty if no arm of the report was asked."""
    head = "| skipped share of a token | with teacher's entropy | the same, by kind of text | with gap of log-probs "
    head += "| with position | skipped, lowest fifth of entropy | highest fifth |"
    lines = []
    for name in SKIPPING:
        block = report["arms"].get(name, {}).get("tokens")
        if not block or not block["correlations"]:
            continue
        found, fifths = block["correlations"], block["by_entropy"]
        kinds = [r for r in found["teacher_entropy"]["by_kind"].values() if r is not None]
        cells = [
            _signed(found["teacher_entropy"]["all"]),
            f"{_signed(min(kinds))} to {_signed(max(kinds))}" if kinds else "",
            _signed(found["log_prob_gap"]["all"]),
            _signed(found["position"]["all"]),
            *("" if fifths[q]["skipped"] is None else f"{fifths[q]['skipped']:.1%}" for q in ("q1", "q5")),
        ]
        lines.append(f"| {SKIPPING[name]} | " + " | ".join(cells) + " |")
    return "\n".join([head, "|---" * 7 + "|", *lines]) if lines else ""


def _signed(r: float | None) -> str:
    return "" if r is None else f"{r:+.2f}"


def _cell(m: dict | None) -> str:
    if m is None:
        return ""
    return f"{figure(m, 'kl_to_teacher')} ({mean_of(m, 'zero_share'):.1%})"


def mean_of(m: dict, key: str) -> float:
    """A figure of an arm: the mean over its seeds where there are several."""
    return m.get(f"{key}_mean", m[key])


def figure(m: dict, key: str) -> str:
    """That figure with its spread over seeds, four digits."""
    spread = f" ± {m[f'{key}_std']:.4f}" if m.get("seeds") else ""
    return f"{mean_of(m, key):.4f}{spread}"


def _line(label: str, m: dict) -> str:
    ce, kl = figure(m, "ce"), figure(m, "kl_to_teacher")
    right, skipped = mean_of(m, "exact_match"), mean_of(m, "zero_share")
    return f"| {label} | {ce} | {kl} | {m['top1_agreement']:.1%} | {right:.1%} | {skipped:.1%} |"


if __name__ == "__main__":
    report = json.loads(Path(sys.argv[1]).read_text())
    print(markdown(report))
    if "net_kl_75" in report["arms"]:
        print(f"\n{frontier(report)}\n\n{ablations(report)}\n\n{budgets(report)}\n\n{rates(report)}")
    if skips := token_table(report):
        print(f"\n{skips}")
