"""Prints the tables of docs/evidence/few_gpus.md: `python examples/quickstart/few_gpus_table.py REPORT.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from readme_table import mean_of

GROUPS = {
    "zero experts that wake up": ("low_rank_matched_kl", "low_rank_matched_{}_kl", "low_rank_untrained"),
    "silent paired zero experts": ("paired_kl", "paired_{}_kl", "paired_untrained"),
    "shared zero experts": ("zeda_stage1_kl", "zeda_{}_kl", "injected_untrained"),
}
"""Kind -> arm in which all weights train, those in which few do, the one that nothing was trained for."""
WHAT = {"lora": "adapters and routers", "norms": "routers and norms", "router": "routers alone (Router-KD)"}
ENDS = {"": "", "_same_time": ", as long as all weights take"}
RIVALS = {
    "static_topk_half": "top-k halved",
    "top_p": "top-p, tuned to half",
    "dynamic_skipping": "Dynamic Skipping, tuned to half",
    "oea_2": "OEA, each token asks for 2",
    "oea_1": "OEA, each token asks for 1",
    "reap_25": "REAP, a quarter of the experts cut",
    "low_rank_untrained": "**zero experts that wake up, fitted**",
    "reap_25_low_rank_untrained": "the same over REAP's three quarters",
    "net_kl": "NET: top-k halved, distilled",
    "net_range_kl": "NET over k = 1 to 4 (MoE-PHDS, M-MoE), at 2",
    "zeda_stage1_kl": "shared zero experts, distilled",
    "zeda_learned_kl": "the same, each a vector that learns",
    "zeda_mean_output_kl": "the same, beginning with the experts' mean output (MoNE)",
    "low_rank_matched_kl": "**zero experts that wake up, distilled**",
}


def what_trains(report: dict) -> str:
    """KL and exact answers of each kind of zero experts, by what trains."""
    lines = [
        "| | numbers that train | KL to teacher | × all weights | exact match | experts skipped |",
        "|---" * 6 + "|",
    ]
    for kind, (full, few, untrained) in GROUPS.items():
        rows = {f"{kind}, all weights": full}
        for tag, words in WHAT.items():
            rows |= {f"{words}{more}": few.format(tag) + end for end, more in ENDS.items()}
        rows["nothing"] = untrained
        every = report["arms"].get(full)
        for label, name in rows.items():
            m = report["arms"].get(name)
            if m is not None:
                lines.append(f"| {label} | " + " | ".join(_cells(m, every)) + " |")
    return "\n".join(lines)


def _cells(m: dict, full: dict) -> list[str]:
    kl = mean_of(m, "kl_to_teacher")
    return [
        f"{m['trained_parameters']:,}" if m.get("trained_parameters") else "0",
        f"{kl:.4f}",
        f"{kl / mean_of(full, 'kl_to_teacher'):.2f}",
        f"{mean_of(m, 'exact_match'):.1%}",
        f"{mean_of(m, 'zero_share'):.1%}",
    ]


def rivals(report: dict) -> str:
    """What each saves: multiply-adds of the experts, and experts that a decoding step of 16 answers loads."""
    lines = [
        "| | KL to teacher | exact match | expert FLOPs | experts loaded, 16 tokens | expert weights |",
        "|---" * 6 + "|",
    ]
    everything = report["teacher"]["experts_loaded"]
    for name, label in RIVALS.items():
        m = report["arms"].get(name)
        if m is None:
            continue
        weights = 0.75 if name.startswith("reap_25") else 1.0
        loaded = m["experts_loaded"] * weights / everything
        cells = [f"{mean_of(m, 'kl_to_teacher'):.4f}", f"{mean_of(m, 'exact_match'):.1%}"]
        cells += [f"{share:.0%}" for share in (m["expert_flops"], loaded, weights)]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    report = json.loads(Path(sys.argv[1]).read_text())
    print(f"{what_trains(report)}\n\n{rivals(report)}")
