"""Charts: the lines lie where the data are, in the page's own colours, without anything from outside."""

import math
import re
import warnings

import numpy as np
import pytest

from eval.plots import Series, line_chart, short_number


def drawn(svg: str, colour: int) -> list[np.ndarray]:
    """The points of each path of this colour, in the chart's own coordinates."""
    paths = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--series-(\d)\)', svg)
    return [
        np.asarray([[float(n) for n in point] for point in re.findall(r"([\d.]+) ([\d.]+)", path)])
        for path, number in paths
        if int(number) == colour
    ]


def test_lines_are_affine_images_of_their_points() -> None:
    points = [(10, 1.0), (20, 4.0), (40, 2.0), (100, 9.0)]
    line, *_ = drawn(line_chart([Series("a", points, 0), Series("b", [(10, 3.0), (100, 0.0)], 3)]), 0)
    expected = np.asarray(points)
    for axis, sign in ((0, 1), (1, -1)):
        slope, offset = np.polyfit(expected[:, axis], line[:, axis], 1)
        assert math.copysign(1, slope) == sign
        assert np.abs(slope * expected[:, axis] + offset - line[:, axis]).max() < 1e-3


def test_smoothing_keeps_a_straight_line_and_halves_noise() -> None:
    noise = np.random.default_rng(0).normal(size=400)
    straight = line_chart([Series("a", [(n, 2.0 * n) for n in range(400)], 0)], smooth=True)
    measured, smooth = drawn(straight, 0)
    assert np.abs(np.interp(smooth[:, 0], *measured.T) - smooth[:, 1]).max() < 4  # of about 150: its ends lean inwards
    measured, smooth = drawn(line_chart([Series("a", list(enumerate(noise.tolist())), 0)], smooth=True), 0)
    assert smooth[:, 1].std() < measured[:, 1].std() / 2


def test_long_lines_are_thinned_and_gaps_left_open() -> None:
    long, *_ = drawn(line_chart([Series("a", [(n, float(n % 7)) for n in range(100_000)], 0)]), 0)
    assert 100 < len(long) <= 600
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in (math.nan, math.inf):
            gap = line_chart([Series("a", [(n, value if 50 < n < 60 else 1.0) for n in range(100)], 0)], smooth=True)
            assert drawn(gap, 0)
        line_chart([Series("a", [(1, math.nan)], 0)])


def test_the_element_stands_alone() -> None:
    svg = line_chart([Series("a", [(1, 2.0), (2, 3.0)], 5)])
    assert svg.startswith("<svg viewBox=")
    assert "http" not in svg
    assert "#" not in re.sub(r'(url\(|href=")#\w+', "", svg)  # no colour but the page's
    assert svg == line_chart([Series("a", [(1, 2.0), (2, 3.0)], 5)])


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (999, "999"), (1200, "1.2k"), (2_500_000, "2.5M"), (3e9, "3G")])
def test_axis_numbers_are_short(value: float, text: str) -> None:
    assert short_number(value) == text
