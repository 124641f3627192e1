"""Plots: well-formed, every point and label inside the picture."""

import xml.etree.ElementTree as ET

import pytest

from grainwise.recipe.plots import bar_plot, curves_plot, histogram_plot, human, path_plot, stacked_plot, ticks

SVG = "{http://www.w3.org/2000/svg}"


def test_points_lie_inside_and_in_order():
    root = ET.fromstring(path_plot([("a & b", 1e6, 20.0), ("c", 4e6, 10.0), ("d", 4e6, 10.0)], "size", "ppl", "bytes"))
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{SVG}circle")]
    assert len(circles) == 2  # two states at one place share a point
    assert all(0 < x < 560 and 0 < y < 300 for x, y in circles)
    assert circles[0][0] < circles[1][0]
    assert circles[0][1] < circles[1][1]  # a higher value is drawn higher
    assert {"a & b", "c, d"} <= {t.text for t in root.iter(f"{SVG}text")}


def test_bars_are_proportional():
    root = ET.fromstring(bar_plot([("x", 10.0), ("y", 5.0), ("z", 0.0)], "speed"))
    widths = [float(r.get("width")) for r in root.iter(f"{SVG}rect")]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.2)
    assert widths[2] == 1


def test_one_point_and_equal_values_draw():
    ET.fromstring(path_plot([("only", 0.0, 0.0)], "x", "y"))
    ET.fromstring(path_plot([("a", 5.0, 1.0), ("b", 5.0, 2.0)], "x", "y"))


def test_figures_for_people():
    assert [human(v, "bytes") for v in (12, 1234, 5.6e6, 7.8e9)] == ["12 B", "1.23 kB", "5.6 MB", "7.8 GB"]
    assert human(12345.6) == "12,346"
    assert human(0.12345) == "0.1235"
    assert ticks(0, 10) == [0, 2.5, 5, 7.5, 10]


def test_shares_reach_to_one():
    (bar,) = ET.fromstring(bar_plot([("x", 0.5)], "accuracy", share=True)).iter(f"{SVG}rect")
    (full,) = ET.fromstring(bar_plot([("x", 1.0)], "accuracy", share=True)).iter(f"{SVG}rect")
    assert float(bar.get("width")) == pytest.approx(float(full.get("width")) / 2, abs=0.2)


def test_stacked_shares_lie_end_to_end():
    root = ET.fromstring(stacked_plot([("a", [0.5, 0.25, 0.25]), ("b", [1.0, 0.0, 0.0])], ("x", "y", "z")))
    boxes = [(float(r.get("x")), float(r.get("width"))) for r in root.iter(f"{SVG}rect")][3:]
    assert len(boxes) == 4  # a share of zero is not drawn
    assert boxes[0][0] + boxes[0][1] == pytest.approx(boxes[1][0], abs=0.2)
    assert boxes[1][0] + boxes[1][1] == pytest.approx(boxes[2][0], abs=0.2)
    assert sum(width for _, width in boxes[:3]) == pytest.approx(boxes[3][1], abs=0.2)


def test_a_histogram_holds_every_value():
    root = ET.fromstring(histogram_plot([("known", [0.0, 0.5, 1.0]), ("near", [0.5])], "confidence", mark=0.5, bins=10))
    known, near = ([tuple(map(float, p.split(","))) for p in g.get("points").split()] for g in root.iter(f"{SVG}polygon"))
    floor = known[0][1]
    assert [i for i, (_, y) in enumerate(known[1:-1:2]) if y < floor] == [0, 5, 9]  # a value of 1 is in the last bin
    assert min(y for _, y in near) < min(y for _, y in known)  # shares of its own series
    (mark,) = (line for line in root.iter(f"{SVG}line") if line.get("stroke-dasharray"))
    assert float(mark.get("x1")) == near[1 + 2 * 5][0]


def test_curves_name_their_areas():
    root = ET.fromstring(curves_plot({"insertion": ([0, 1], [0, 1]), "deletion": ([0, 0.5, 1], [1, 0, 0])}, "share"))
    words = [t.text for t in root.iter(f"{SVG}text")]
    assert "insertion, area 0.50" in words
    assert "deletion, area 0.25" in words
