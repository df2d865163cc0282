"""Draws the README's picture from a report: `python examples/quickstart/picture.py REPORT.json > docs/frontier.svg`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from readme_table import FRONTIER, mean_of
from report.legend import ARMS

from zeda_megatron.evaluation.comparison.plots import Drawing, colour, standalone

LINES = {
    "NET": ("NET: top-k cut", "net_kl", (12, 5)),
    "shared zero experts": ("shared zero experts (ZEDA)", "zeda_stage1_kl", (12, -5)),
    "silent paired zero experts": ("paired zero experts, silent", "paired_kl", (12, 9)),
    "the same, waking up, hidden states matched": (
        "waking up, states matched",
        "low_rank_matched_kl",
        (12, -9),
    ),
}
"""What is trained, at several shares, by its name in the README's table: name and colour here, and where to write."""
POINTS = {
    "low_rank_untrained": ("waking up, fitted, not trained", (8, -84)),
    "top_p": ("top-p", (11, 0)),
    "static_topk_half": ("top-k halved", (11, 0)),
}
"""Arms without training."""


def picture(report: dict) -> str:
    """SVG of KL to the teacher over the share of expert FLOPs that is skipped, for light pages and dark ones."""
    drawing = Drawing(
        "KL to the teacher over the share of expert FLOPs that is skipped",
        (860, 400),
        "share of expert FLOPs that is skipped",
        "KL to the teacher, nats per token",
    )
    drawing.figure.get_layout_engine().set(w_pad=0.25, h_pad=0.2)
    axes, colours = drawing.axes, []
    for line, (label, arm, aside) in LINES.items():
        names = [name for name in FRONTIER[line].values() if name in report["arms"]]
        points = [where(report["arms"][name]) for name in names]
        own = colour(len(colours))
        axes.plot(*zip(*points), color=own, linewidth=2.4, zorder=3)
        for name, point in zip(names, points):
            (mark,) = axes.plot(
                *point, "o", color=own, markersize=8, markeredgecolor=colour("card"), zorder=4
            )
            drawing.titled(mark, f"{name}: {point[0]:.1%} skipped, KL {point[1]:.4f}")
        _write(axes, label, points[-1], aside)
        colours.append((ARMS[arm].light, ARMS[arm].dark))
    for name, (label, aside) in POINTS.items():
        point = where(report["arms"][name])
        own = colour(len(colours))
        look = {"markerfacecolor": colour("card"), "markeredgecolor": own, "markeredgewidth": 2.2}
        (mark,) = axes.plot(
            *point, "o" if name.startswith("low_rank") else "s", markersize=8, zorder=4, **look
        )
        drawing.titled(mark, f"{name}: {point[0]:.1%} skipped, KL {point[1]:.4f}")
        _write(axes, label, point, aside)
        colours.append((ARMS[name].light, ARMS[name].dark))
    axes.set(xlim=(0.2, 0.95), ylim=(0.0025, 0.25), xticks=[0.25, 0.5, 0.75])
    axes.set_xticklabels(["25%", "50%", "75%"])
    drawing.log_y()
    return standalone(drawing.svg(), colours)


def where(m: dict) -> tuple[float, float]:
    """Skipped share of the expert FLOPs, and the KL: means over seeds where there are several."""
    return 1.0 - m["expert_flops"], mean_of(m, "kl_to_teacher")


def _write(axes, text: str, point: tuple[float, float], aside: tuple[int, int]) -> None:
    where = {"xytext": aside, "textcoords": "offset points", "in_layout": False}
    side = {"ha": "left" if aside[0] > 0 else "right", "va": "center_baseline"}
    far = (
        {"arrowprops": {"arrowstyle": "-", "color": colour("soft"), "shrinkB": 6, "relpos": (0, 1)}}
        if abs(aside[1]) > 20
        else {}
    )
    axes.annotate(text, point, size=13, color=colour("ink"), **where, **side, **far)


if __name__ == "__main__":
    print(picture(json.loads(Path(sys.argv[1]).read_text())), end="")
