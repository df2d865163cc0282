"""A grid of shares: one cell per value, darker for more."""

import sys
from pathlib import Path
from xml.etree import ElementTree

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "quickstart"))
from report.svg_grid import grid


def cells(drawing):
    return [e for e in drawing.iter() if e.tag == "rect"]


def test_every_value_is_a_cell_as_dark_as_it_is_large():
    drawing = ElementTree.fromstring(
        grid([[0.25, None, 1.0], [0.0, 0.5, float("nan")]], 3, "layer", "expert")
    )
    found = {cell[0].text: cell.get("fill-opacity") for cell in cells(drawing)}
    assert found == {
        "layer 0, expert 0: 0.250": "0.25",
        "layer 0, expert 2: 1.000": "1.00",
        "layer 1, expert 0: 0.000": "0.00",
        "layer 1, expert 1: 0.500": "0.50",
    }
    assert all(cell.get("class") == "bar c3" for cell in cells(drawing))


def test_a_large_grid_has_no_hover_texts_and_nothing_is_drawn_without_values():
    drawing = ElementTree.fromstring(grid([[0.5] * 128] * 48, 0, "layer", "expert"))
    assert len(cells(drawing)) == 128 * 48 and not any(len(cell) for cell in cells(drawing))
    assert grid([], 0, "layer", "expert") == "" and grid([[None]], 0, "layer", "expert") == ""
