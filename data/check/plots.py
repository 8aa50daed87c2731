"""Pictures of the check's distributions, as PNG files."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from data.check.histogram import Histogram
from vlm.paths import write_output

Values = NDArray[np.float64]
_BINS = 60
# File name: (histograms drawn, label of the axis, divided by, logarithmic axis)
_PLOTS = {
    "image_sizes": (("image_width_px", "image_height_px"), "pixels", 1, False),
    "image_aspect": (("image_aspect_thousandths",), "width / height", 1000, True),
    "image_bytes": (("image_bytes",), "bytes", 1, True),
    "images_per_document": (("images_per_document",), "images a document", 1, False),
    "caption_characters": (("caption_characters",), "characters", 1, False),
    "caption_words": (("caption_words",), "words", 1, False),
    "captions_per_sample": (("captions_per_sample",), "captions a sample", 1, False),
    "caption_clip_tokens": (("caption_clip_tokens",), "CLIP tokens", 1, False),
}
PLOTS = tuple(f"{name}.png" for name in _PLOTS)


def draw_plots(histograms: Mapping[str, Histogram], folder: Path) -> tuple[Path, ...]:
    """Draw each distribution that holds anything into `folder`; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, (quantities, label, unit, logarithmic) in _PLOTS.items():
        arrays = {quantity: histograms[quantity].arrays() for quantity in quantities}
        if any(len(values) for values, _ in arrays.values()):
            series = {
                quantity: (values / unit, counts.astype(np.float64)) for quantity, (values, counts) in arrays.items()
            }
            drawn.append(_draw(folder / f"{name}.png", series, label, logarithmic))
    return tuple(drawn)


def _draw(path: Path, series: Mapping[str, tuple[Values, Values]], label: str, logarithmic: bool) -> Path:
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    low = min(values.min() for values, _ in series.values() if len(values))
    high = max(values.max() for values, _ in series.values() if len(values))
    edges = _edges(low, high, logarithmic)
    for name, (values, counts) in series.items():
        axes.hist(values, edges.tolist(), weights=counts, alpha=0.6, label=name.split("_")[1])
    axes.set_xlabel(label)
    axes.set_ylabel("count")
    if logarithmic:
        axes.set_xscale("log")
    if len(series) > 1:
        axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    write_output(path, drawn.getvalue(), "--plots")
    return path


def _edges(low: float, high: float, logarithmic: bool) -> Values:
    """Bin edges; for whole numbers in a narrow range one bin a number."""
    if logarithmic:
        return np.geomspace(max(low, 1e-3) * 0.99, max(high, 1e-3) * 1.01, _BINS + 1)
    if high - low < _BINS:
        return np.arange(low, high + 2) - 0.5
    return np.linspace(low, high, _BINS + 1)
