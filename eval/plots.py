"""Line charts as inline SVG whose colours and fonts are those of the page around it, by day and by night."""

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from eval.run_record import Point

Values = NDArray[np.float64]

NUM_COLOURS = 8
_MOST_POINTS = 600
_LEAST_SMOOTHED = 40
_INK, _GRID = "#b00001", "#b00002"  # stand for the page's own colours until the end
_DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)))


class Series(NamedTuple):
    """One line: its points by step (or samples), and which of the page's colours it has, from 0."""

    label: str
    points: Sequence[Point]
    colour: int


class Moment(NamedTuple):
    """Histograms of cosines at one step: counts in equal bins from -1 to 1, of each of the page's colours from 0 on."""

    step: int
    counts: Sequence[Sequence[int]]


def line_chart(
    series: Sequence[Series],
    *,
    smooth: bool = False,
    from_zero: bool = False,
    value_format: Callable[[float], str] = "{:.4g}".format,
    most: float = math.inf,
) -> str:
    """An SVG element with these lines over their first coordinate; no tick is above `most`, what a value can be.

    Long lines are averaged in equal pieces; `smooth` draws a moving average above the pale line of what was measured.
    """

    def draw(axes: Axes) -> None:
        for line in series:
            _draw(axes, line, smooth)
        _dress(axes, from_zero, value_format, most)

    return _element("".join(f"{line.label}{line.points[-1:]}" for line in series), draw)


def ridge_chart(moments: Sequence[Moment]) -> str:
    """An SVG element with the histograms of each moment, the first on top, over the cosines that occur."""
    table = np.array([moment.counts for moment in moments], dtype=np.float64)  # [moments, colours, bins]
    edges = np.linspace(-1, 1, table.shape[2] + 1)
    occurring = np.flatnonzero(table.sum((0, 1)))
    first, last = (occurring[0], occurring[-1]) if len(occurring) else (0, table.shape[2] - 1)

    def draw(axes: Axes) -> None:
        for row, heights in enumerate(table / max(1.0, table.max())):
            for number, tops in enumerate(heights):
                colour = f"#a0000{number % NUM_COLOURS}"
                axes.stairs(0.9 * tops - row, edges, baseline=-row, fill=True, color=colour, alpha=0.5, linewidth=0)
        axes.set_xlim(edges[first], edges[last + 1])
        _dress(axes, False, "{:.4g}".format)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_yticks([-row for row in range(len(moments))], [short_number(moment.step) for moment in moments])
        axes.set_ylim(-len(moments) + 0.9, 1)

    return _element(f"{moments}", draw)


def _element(salt: str, draw: Callable[[Axes], None]) -> str:
    """The SVG element of one pair of axes; ids are the same each time and differ between the charts of a page."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):  # text stays text, in the page's font
        figure = Figure(figsize=(4.7, 2.5))
        draw(figure.add_axes((0.105, 0.105, 0.87, 0.86)))
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return _inline(written.getvalue())


def _draw(axes: Axes, line: Series, smooth: bool) -> None:
    places, values = _thinned(line.points)
    colour = f"#a0000{line.colour % NUM_COLOURS}"
    style: dict[str, Any] = {
        "color": colour,
        "solid_capstyle": "round",
        "linestyle": _DASHES[line.colour // NUM_COLOURS % len(_DASHES)],
    }
    if smooth and len(values) >= _LEAST_SMOOTHED:
        axes.plot(places, values, linewidth=1, alpha=0.28, **style)
        axes.plot(places, _moving_average(values), linewidth=1.8, **style)
    else:
        few = len(values) <= 24
        axes.plot(places, values, linewidth=1.8, marker="o" if few else None, markersize=3.6, **style)


def _dress(axes: Axes, from_zero: bool, value_format: Callable[[float], str], most: float = math.inf) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.tick_params(colors=_INK, labelsize=8.5, length=0, pad=4)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.015, y=0.08)
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    low, high = axes.get_ylim()
    axes.yaxis.set_ticks([tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= min(high, most)])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: value_format(value)))


def _thinned(points: Sequence[Point]) -> tuple[Values, Values]:
    table = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    if len(table) > _MOST_POINTS:
        table = np.stack([chunk.mean(axis=0) for chunk in np.array_split(table, _MOST_POINTS)])
    return table[:, 0], table[:, 1]


def _moving_average(values: Values) -> Values:
    """Centred, over about a twelfth of the line and less at its ends; what is no number is passed over."""
    half = max(1, len(values) // 24)
    kernel = np.ones(2 * half + 1)
    known = np.isfinite(values)
    totals = np.convolve(np.where(known, values, 0.0), kernel, "same")
    counts = np.convolve(known.astype(np.float64), kernel, "same")
    averages = np.full(len(values), np.nan)
    np.divide(totals, counts, out=averages, where=counts > 0)
    return averages


def short_number(value: float) -> str:
    """A number for an axis: 1200 is "1.2k"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def _inline(document: str) -> str:
    """The SVG element alone, without addresses, sized by the page, its colours and font taken from the page."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    opening = re.sub(r' (?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", svg[: svg.index(">")])
    svg = opening + svg[svg.index(">") :]
    svg = svg.replace(_INK, "var(--ink-soft)").replace(_GRID, "var(--line)")
    svg = re.sub(r"#a0000(\d)", r"var(--series-\1)", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--sans)", svg)
    return re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", svg)
