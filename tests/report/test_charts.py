"""Charts put points where they belong, and write nothing where there is nothing."""

from __future__ import annotations

import re

import pytest

from maskft.report.charts import heat_map, histogram, intervals, line_chart, line_style, matrix, shortened, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (3, 97, [0, 20, 40, 60, 80, 100]),
        (0, 0, [-0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6]),
    ],
)
def test_ticks(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_ticks_span_what_is_shown() -> None:
    for low, high in ((0.0123, 0.0129), (-5, 3), (1e6, 3e6), (7, 7)):
        found = ticks(low, high)
        assert found[0] <= low <= high <= found[-1]
        assert 3 <= len(found) <= 9


def test_lines() -> None:
    chart = line_chart("Loss", {"a<b": [(0, 1.0), (10, 0.0)]}, x="step", y="nats")
    points = re.findall(r'points="([^"]*)"', chart)
    assert points == ["66.0,10.0 416.0,212.0"]  # corners of the frame
    assert "a&lt;b: 1 to 0" in chart
    assert "a<b" not in chart
    assert line_chart("Loss", {"a": []}, x="step", y="nats") == ""


def test_a_line_goes_through_the_mean_of_points_that_share_an_x() -> None:
    chart = line_chart("Accuracy", {"a": [(0, 0.0), (10, 1.0), (10, 3.0), (20, 4.0)]}, x="rho", y="share")
    assert re.findall(r'points="([^"]*)"', chart) == ["66.0,212.0 241.0,111.0 416.0,10.0"]
    assert chart.count("<circle") == 4


def test_intervals_of_points_stand_upright_side_by_side() -> None:
    lines = {"a": [(0, 1.0), (10, 2.0)], "b": [(0, 1.5), (10, 1.5)]}
    chart = line_chart("Accuracy", lines, x="step", y="share", spans={"a": [(0, 0.0, 4.0)], "b": [(0, 1.0, 2.0)]})
    found = re.findall(r'<line x1="([^"]*)" y1="([^"]*)" x2="([^"]*)" y2="([^"]*)" stroke-width="1"', chart)
    assert found == [("65.0", "212.0", "65.0", "10.0"), ("67.0", "161.5", "67.0", "111.0")]  # of a frame from 0 to 4


def test_names_of_intervals_are_whole_up_to_a_width() -> None:
    names = [
        "low-rank 0.002 small-pictures",
        "low-rank 0.0012 small-pictures",
        "a name that is longer than any picture",
    ]
    chart = intervals("Accuracy", [(name, 0.5, 0.4, 0.6) for name in names], x="accuracy")
    shown = re.findall(r'text-anchor="end">([^<]*)<', chart)
    assert shown[:2] == names[:2]
    assert len(shown[2]) == 32


def test_lines_beyond_the_colours_are_dashed() -> None:
    assert "dash" not in line_style(5)
    assert "dash" in line_style(6)
    assert len({line_style(n) for n in range(20)}) == 20


def test_intervals() -> None:
    chart = intervals("Score", [("base", 0.5, 0.25, 0.75)], x="score")
    (low, high), (middle,) = (
        [float(x) for x in re.search(pattern, chart.split("<title>")[1]).groups()]  # type: ignore[union-attr]
        for pattern in (r'x1="([\d.]+)" y1="[\d.]+" x2="([\d.]+)"', r'cx="([\d.]+)"')
    )
    assert middle == pytest.approx((low + high) / 2)
    assert low < high
    assert "base: 50 % (25 % to 75 %)" in chart
    assert intervals("Score", [], x="score") == ""


def test_heat_map() -> None:
    chart = heat_map("Heat", ["q", "k"], ["0", "1"], {(0, 0): 0.0, (1, 1): 2.0}, top=2.0, x="layer")
    assert chart.count("<title>") == 2
    assert "largest 2, k of 1" in chart
    assert heat_map("Heat", [], [], {}, top=1, x="layer") == ""
    assert "#440154" in heat_map("Heat", ["q"], ["0"], {(0, 0): 0.0}, top=0.0, x="layer")


def test_histogram() -> None:
    chart = histogram("Gates", [0, 10, 1000], 1.5, x="gate", start=0.98)
    assert chart.count("<rect") == 2
    assert "most gates lie from 1 to 1.5; they started at 0.98" in chart
    heights = [float(h) for h in re.findall(r'height="([\d.]+)" fill', chart)]
    assert heights[0] == pytest.approx(heights[1] / 3, rel=0.1)  # logarithmic: 1 decade and 3
    assert histogram("Gates", [0, 0], 1.0, x="gate") == ""


def test_matrix() -> None:
    chart = matrix("Overlap", ["a", "b"], {(0, 0): 1.0, (0, 1): 0.25, (1, 0): 0.3, (1, 1): 1.0})
    assert "pairs share 25 % to 30 %" in chart
    assert ">25</text>" in chart
    many = matrix("Overlap", [str(n) for n in range(20)], {(0, 1): 0.45})
    assert ">45</text>" not in many
    assert "one run" in matrix("Overlap", ["a"], {(0, 0): 1.0})
    assert matrix("Overlap", [], {}) == ""


def test_large_numbers_are_short() -> None:
    chart = histogram("Gates", [1, 5_000_000], 1.0, x="gate")
    assert ">1M<" in chart
    assert ">10<" in chart


def test_shortened() -> None:
    assert shortened("short", 5) == "short"
    assert shortened("abcdefghij", 5) == "ab…ij"
