"""Plots: marks where the axis says, labels out of each other's way, text that stays text."""

import random
import re
import xml.etree.ElementTree as ElementTree

import pytest

from zeda_megatron.evaluation.comparison.plots import Drawing, Mark, colour, scatter, span


def labels(drawing: str) -> list[tuple[float, float, float, float]]:
    """Boxes of the labels: texts in the colour of ink, as wide as page fonts write them."""
    found = []
    for text in ElementTree.fromstring(drawing).iter("text"):
        if "var(--ink)" in text.get("style"):
            width, x, y = 6.6 * len(text.text), float(text.get("x")), float(text.get("y"))
            left = x if "text-anchor: start" in text.get("style") else x - width
            found.append((left, y - 10, left + width, y + 2))
    return found


@pytest.mark.parametrize("size", [(1000, 430), (400, 400)])
def test_labels_of_a_crowd_touch_neither_each_other_nor_the_rim(size):
    generator = random.Random(0)
    marks = [
        Mark(f"arm_number_{i}", generator.gauss(0.5, 0.02), generator.uniform(0.009, 0.045), i)
        for i in range(13)
    ]
    found = labels(scatter(marks, "share", "KL", size=size))
    assert len(found) == 13
    for i, a in enumerate(found):
        assert a[0] >= 0 and a[2] <= size[0]
        for b in found[i + 1 :]:
            assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


def test_where_there_is_no_room_a_label_is_left_out_and_hovering_tells():
    drawing = scatter(
        [Mark(f"arm_{i}", 0.5, 0.5 + i / 1000, i) for i in range(60)], "share", "KL", size=(400, 400)
    )
    found = labels(drawing)
    assert 10 < len(found) < 60 and drawing.count("<title>arm_") == 60
    for i, a in enumerate(found):
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in found[i + 1 :])


def test_marks_are_drawn_where_the_axis_says_in_the_colour_of_their_arm():
    marks = [Mark("a", 0.2, 1.0, 0), Mark("b", 0.8, 3.0, 7, square=True, hollow=True)]
    first, second = ElementTree.fromstring(scatter(marks, "x", "y")).iter("use")
    assert float(first.get("x")) < float(second.get("x")) and float(first.get("y")) > float(second.get("y"))
    assert "fill: var(--c0)" in first.get("style") and "fill: var(--card)" in second.get("style")
    assert "stroke: var(--c7)" in second.get("style")


def test_names_stay_text_whatever_is_in_them():
    names = ["a$b_$c", "<b>&amp;", "#010000", 'x" onload="y', "$"]
    drawing = scatter([Mark(name, i, i + 1, i) for i, name in enumerate(names)], "x", "y")
    root = ElementTree.fromstring(drawing)
    assert set(names) <= {text.text for text in root.iter("text")}
    assert {title.text for title in root.iter("title")} == set(names)


@pytest.mark.parametrize("range_", [(0.009, 0.06), (0.01, 2.0), (0.001, 50.0), (0.9, 1.2)])
def test_a_logarithmic_axis_has_plain_numbers(range_):
    drawing = scatter([Mark("a", 0, range_[0], 0), Mark("b", 1, range_[1], 1)], "x", "y", log_y=True)
    texts = [t for t in ElementTree.fromstring(drawing).iter("text") if "text-anchor: end" in t.get("style")]
    ticks = [float(t.text) for t in texts if "var(--soft)" in t.get("style")]
    assert len(ticks) >= 2 and ticks == sorted(ticks) and ticks[0] > 0


def test_a_drawing_is_the_same_each_time_and_needs_nothing_from_outside():
    made = [scatter([Mark("a", 0.1, 0.2, 0)], "x", "y") for _ in range(2)]
    assert made[0] == made[1]
    assert not re.search(r"https?:|url\((?!#)|<script|<style|font-family|#01", made[0])


def test_nothing_to_draw_is_nothing():
    assert scatter([], "x", "y") == "" and scatter([Mark("a", float("nan"), 1.0, 0)], "x", "y") == ""
    assert scatter([Mark("a", 0.0, -1.0, 0)], "x", "y", log_y=True) == ""


def test_span_of_one_value_is_not_empty():
    for values in ([0.0], [5.0], [-2.0]):
        low, high = span(values)
        assert low < values[0] < high
    low, high = span([0.1], log=True)
    assert 0 < low < 0.1 < high


def test_every_artist_can_say_what_it_shows():
    drawing = Drawing("bars", (200, 100))
    for i, bar in enumerate(drawing.axes.bar([0, 1], [0.25, 0.5], color=colour(3))):
        drawing.titled(bar, f"layer {i}")
    text = drawing.svg()
    assert (
        "<title>layer 0</title>" in text
        and "<title>layer 1</title>" in text
        and text.count("fill: var(--c3)") == 2
    )
