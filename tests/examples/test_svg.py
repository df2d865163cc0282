"""Small charts: scales land where they should, labels keep out of each other's way."""

import random
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "quickstart"))
from report.svg import Mark, Series, bars, line_chart, scatter
from report.svg_scale import Axis, running_mean, span, thin


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.27, 0.55), (-3.0, 120.0), (1.79, 1.86), (0.0, 1e-4)]
)
def test_ticks_are_round_and_inside(low, high):
    ticks = Axis(low, high, 0, 100).ticks()
    assert 3 <= len(ticks) <= 11
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert all(len(f"{tick:.6g}") <= 6 for tick in ticks)


@pytest.mark.parametrize(("low", "high"), [(0.009, 0.06), (0.01, 2.0), (0.001, 50.0), (0.9, 1.2)])
def test_log_ticks_are_inside_and_in_order(low, high):
    ticks = Axis(low, high, 0, 100, log=True).ticks()
    assert len(ticks) >= 2 and ticks == sorted(ticks)
    assert all(low * 0.999 <= tick <= high * 1.001 for tick in ticks)


def test_axis_maps_ends_to_ends_and_the_geometric_mean_to_the_middle():
    assert [Axis(2, 6, 10, 50)(v) for v in (2, 4, 6)] == [10, 30, 50]
    assert Axis(1, 100, 0, 1, log=True)(10) == pytest.approx(0.5)


def test_span_of_one_value_or_none_is_not_empty():
    for values in ([], [0.0], [5.0], [float("nan")]):
        low, high = span(values)
        assert low < high
    low, high = span([0.0, 0.1, -1.0], log=True)
    assert 0 < low < 0.1 < high


def test_thinning_keeps_the_ends_and_the_mean():
    points = [(float(i), float(i % 7)) for i in range(5000)]
    thinned = thin(points)
    assert len(thinned) <= 400 and thinned[0] == points[0] and thinned[-1] == points[-1]
    assert sum(y for _, y in thinned) / len(thinned) == pytest.approx(3.0, abs=0.1)


def test_running_mean_is_the_mean_of_the_last_values():
    points = [(float(i), float(i)) for i in range(6)]
    assert running_mean(points, 3) == [(0, 0), (1, 0.5), (2, 1), (3, 2), (4, 3), (5, 4)]


def boxes(drawing: str) -> list[tuple[float, float, float, float]]:
    found = []
    for text in ElementTree.fromstring(drawing).iter("text"):
        if text.get("class") == "label":
            width, x, y = 6.6 * len(text.text), float(text.get("x")), float(text.get("y"))
            left = x if text.get("text-anchor") == "start" else x - width
            found.append((left, y - 10, left + width, y + 2))
    return found


@pytest.mark.parametrize("size", [(1000, 430), (400, 400)])
def test_labels_of_a_crowd_touch_neither_each_other_nor_the_rim(size):
    generator = random.Random(0)
    marks = [
        Mark(f"arm_number_{i}", generator.gauss(0.5, 0.02), generator.uniform(0.009, 0.045))
        for i in range(13)
    ]
    found = boxes(scatter(marks, "share", "KL", size=size))
    assert len(found) == 13
    for i, a in enumerate(found):
        assert a[0] >= 0 and a[2] <= size[0]
        for b in found[i + 1 :]:
            assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


def test_points_are_drawn_where_the_axis_says():
    drawing = ElementTree.fromstring(
        scatter([Mark("a", 0.2, 1.0), Mark("b", 0.8, 3.0, square=True)], "x", "y")
    )
    (circle,) = drawing.iter("circle")
    square = next(r for r in drawing.iter("rect"))
    assert float(circle.get("cx")) < float(square.get("x"))
    assert float(circle.get("cy")) > float(square.get("y"))


def test_bars_have_the_height_of_their_value():
    drawing = ElementTree.fromstring(bars([0.25, None, 0.5, 1.0], 0, "layer"))
    heights = [float(r.get("height")) for r in drawing.iter("rect")]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2) and heights[2] == pytest.approx(
        4 * heights[0], abs=0.3
    )


def test_charts_without_a_drawable_point_are_empty():
    assert line_chart([Series("a", [])], "x", "y") == ""
    assert line_chart([Series("a", [(1.0, -2.0)])], "x", "y", log_y=True) == ""
    assert scatter([], "x", "y") == "" and bars([None], 0, "layer") == ""


def test_a_line_passes_through_its_points_and_skips_what_is_not_finite():
    drawing = line_chart(
        [Series("a", [(0.0, 0.0), (1.0, float("nan")), (2.0, 1.0)])], "x", "y", y_range=(0, 1)
    )
    (path,) = re.findall(r'class="line c0" d="M([^"]*)"', drawing)
    first, last = (tuple(map(float, point.split())) for point in path.split("L"))
    assert first[0] < last[0] and first[1] == 270 - 44 and last[1] == 14
