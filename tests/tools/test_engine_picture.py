"""The picture of serving speed shows the figures that it is given."""

import re

from tools.measure import engine_picture


def test_every_figure_of_a_line_is_a_mark_with_its_spread():
    shares = (0.0, 0.25, 0.5, 0.75)
    rows = [
        {
            "phase": p,
            "batch": b,
            "way": way,
            "share": z,
            "ratio": 1 - z / 2 + b / 1000,
            "least": 0.1,
            "most": 1.4,
        }
        for p in ("prefill", "decode")
        for b in (1, 8, 32)
        for way in ("skip", "weight 0")
        for z in shares[way != "skip" :]
    ]
    svg = engine_picture.picture(rows)
    told = re.findall(r"<title>([^<]*)</title>", svg)
    wanted = [
        f"{label}, z = {z:g}: {1 - z / 2 + batch / 1000:.2f} (0.10 to 1.40)"
        for label, _, batch, way in engine_picture.LINES
        for z in shares[way != "skip" :]
    ]
    assert sorted(told) == sorted(wanted)
    assert all(f">{label}<" in svg for label, *_ in engine_picture.LINES)
    assert "prefers-color-scheme:dark" in svg
