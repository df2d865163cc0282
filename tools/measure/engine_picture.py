"""Draws the README's picture of serving speed: `python -m tools.measure.engine_picture FIGURES.json > docs/speed.svg`.

FIGURES.json is what `python -m tools.measure.engine --json` wrote.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from zeda_megatron.evaluation.comparison.plots import Drawing, colour, standalone

LINES = (
    ("decode, batch 8", "decode", 8, "skip"),
    ("decode, batch 32", "decode", 32, "skip"),
    ("prefill, 32 prompts", "prefill", 32, "skip"),
    ("prefill, zero slots computed with weight 0", "prefill", 32, "weight 0"),
)
"""What a line says, and which rows of the figures it is."""
ROOM = 0.09
"""Between two labels, in units of the vertical axis."""
COLOURS = (("#2563eb", "#7aa2f7"), ("#0d9488", "#4fd1c5"), ("#b45309", "#e0af68"), ("#8a8f98", "#8a93a0"))


def picture(rows: list[dict]) -> str:
    """SVG of the time of a step over the share of picks that is skipped, 1 being the static model."""
    drawing = Drawing(
        "Time of a whole step in vLLM over the share of picks that is skipped",
        (860, 360),
        "share of picks that is skipped",
        "time / static model",
    )
    drawing.figure.get_layout_engine().set(w_pad=0.25, h_pad=0.2)
    ends = []
    for number, (label, phase, batch, way) in enumerate(LINES):
        found = [row for row in rows if (row["phase"], row["batch"], row["way"]) == (phase, batch, way)]
        points = sorted({row["share"]: row["ratio"] for row in found}.items())
        points = points if way == "skip" else [(0.0, 1.0), *points]
        own, line = colour(number), "-" if way == "skip" else "--"
        drawing.axes.plot(*zip(*points), color=own, linewidth=2.4, linestyle=line)
        for row in found:
            spread = f"{row['least']:.2f} to {row['most']:.2f}"
            (mark,) = drawing.axes.plot(row["share"], row["ratio"], "o", color=own, markersize=7)
            drawing.titled(mark, f"{label}, z = {row['share']:g}: {row['ratio']:.2f} ({spread})")
        ends.append((points[-1][1], points[-1][0], label))
    height = 0.0
    for last, share, label in sorted(ends):
        height = max(last, height + ROOM)  # a label steps up where another one is
        drawing.axes.annotate(
            label, (share + 0.02, height), va="center", color=colour("ink"), size=13, in_layout=False
        )
    drawing.axes.set(xlim=(-0.02, 1.35), ylim=(0, 1.3), xticks=[0, 0.25, 0.5, 0.75])
    drawing.axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    drawing.axes.set_xticklabels(["0", "25%", "50%", "75%"])
    return standalone(drawing.svg(), list(COLOURS))


if __name__ == "__main__":
    print(picture(json.loads(Path(sys.argv[1]).read_text())), end="")
