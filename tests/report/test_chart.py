"""Charts: where a value lies in the SVG, by a calculation of its own; thinning; escaping."""

import re
from xml.etree import ElementTree

import pytest

from megam3.report.chart import HEIGHT, MAX_POINTS, WIDTH, Line, line_chart, thin
from megam3.report.record import Point
from megam3.report.text import figure, safe


def drawn(chart: str) -> list[list[tuple[float, float]]]:
    """Coordinates of each line; an XML parser refuses an SVG that is not well-formed."""
    svg = ElementTree.fromstring(chart[chart.index("<svg") : chart.index("</svg>") + len("</svg>")])
    lines = [path for path in svg.iter("path") if "line" in path.attrib["class"].split()]
    return [
        [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path.attrib["d"])]
        for path in lines
    ]


def test_values_lie_in_proportion() -> None:
    points = [Point(0, 0.0), Point(10, 1.0), Point(40, 4.0)]
    ((first, second, last),) = drawn(line_chart("loss", [Line("run", 0, points)]))
    assert first[0] < second[0] < last[0] <= WIDTH
    assert HEIGHT > first[1] > second[1] > last[1] >= 0
    # a quarter of the way in steps and in value
    assert second[0] - first[0] == pytest.approx((last[0] - first[0]) / 4, abs=0.1)
    assert first[1] - second[1] == pytest.approx((first[1] - last[1]) / 4, abs=0.1)


def test_a_logarithmic_axis_spaces_powers_of_ten_equally() -> None:
    points = [Point(step, 10.0**step) for step in range(4)]
    chart = line_chart("grad_norm", [Line("run", 0, points)], may_be_log=True)
    heights = [y for _, y in drawn(chart)[0]]
    gaps = [lower - upper for lower, upper in zip(heights, heights[1:], strict=False)]
    assert "(logarithmic)" in chart
    assert gaps == pytest.approx([gaps[0]] * 3, abs=0.15)
    with_zero = [Point(0, 0.0), *points[1:]]
    assert "(logarithmic)" not in line_chart("grad_norm", [Line("run", 0, with_zero)], may_be_log=True)


def test_lines_of_one_chart_share_their_axes() -> None:
    low = Line("low", 0, [Point(1, 1.0), Point(5, 1.0)])
    high = Line("high", 1, [Point(1, 3.0), Point(9, 3.0)])
    of_low, of_high = drawn(line_chart("loss", [low, high]))
    assert of_low[0][0] == of_high[0][0]
    assert of_low[1][0] < of_high[1][0]
    assert of_low[0][1] > of_high[0][1]


@pytest.mark.parametrize("values", [[2.0], [0.0], [0.0, 0.0], [-3.0, -3.0], [1e-30, 1e30], [7.0, 7.0000001]])
def test_flat_single_and_extreme_lines_stay_inside(values: list[float]) -> None:
    points = [Point(step, value) for step, value in enumerate(values, 1)]
    (line,) = drawn(line_chart("loss", [Line("run", 0, points)]))
    assert len(line) == len(values)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in line)


def test_no_points_no_chart() -> None:
    assert line_chart("loss", [Line("run", 0, [])]) == ""


def test_thinning_keeps_the_mean_and_bounds_the_size() -> None:
    points = [Point(step, float(step % 7)) for step in range(MAX_POINTS * 10)]
    few = thin(points)
    assert len(few) == MAX_POINTS
    assert sum(p.value for p in few) / len(few) == pytest.approx(sum(p.value for p in points) / len(points))
    assert thin(points[:MAX_POINTS]) == points[:MAX_POINTS]


def test_more_lines_than_colours_are_told_apart_by_their_dash() -> None:
    lines = [Line(f"run {index}", index, [Point(1, 1.0), Point(2, float(index))]) for index in range(8)]
    chart = line_chart("loss", lines)
    styles = re.findall(r'<path class="(line line-\d)"( stroke-dasharray="[^"]*")?', chart)
    assert len(styles) == len(set(styles)) == 8


def test_text_is_escaped() -> None:
    assert safe("<b a='\"'>&") == "&lt;b a=&#x27;&quot;&#x27;&gt;&amp;"
    assert safe("caf\udce9") == "caf?"  # as a file name that is no UTF-8 arrives
    chart = line_chart("<i>", [Line("<script>", 0, [Point(1, 1.0)])])
    assert "<script>" not in chart
    assert "<i>" not in chart


def test_figures_are_short() -> None:
    assert [figure(value) for value in (0, 0.5, 1234567.0, 2e-5)] == ["0", "0.5", "1,234,567", "2e-05"]
