"""Pictures of the geometry: the two clouds in two projections, scores, and spectra; each a PNG."""

import io
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from eval.geometry import PLOTS, MeasuredGeometry
from vlm.paths import write_output

Rows = NDArray[np.float64]

_IMAGE, _TEXT = "#2f6db5", "#c9622b"
_MOST_LINES, _MOST_POINTS = 60, 1000
_PERPLEXITY = 30
_ONE_POINT = 1e-6  # standard deviation of unit rows that differ by rounding only


def write_plots(measured: MeasuredGeometry, folder: Path) -> list[Path]:
    """Write the files called `PLOTS` into a folder, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figures = (_clouds(measured), _scores(measured), _spectra(measured))
        return [_write(figure, folder / name) for name, figure in zip(PLOTS, figures, strict=True)]


def _write(figure: Figure, path: Path) -> Path:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150, bbox_inches="tight")
    write_output(path, drawn.getvalue(), "--plots")
    return path


def _clouds(measured: MeasuredGeometry) -> Figure:
    """Principal components keep distances, t-SNE neighbours; pairs are joined where that stays readable."""
    count = min(len(measured.images), _MOST_POINTS)
    images, texts = (rows[:count].cpu().double().numpy() for rows in (measured.images, measured.texts))
    both = np.concatenate([images, texts])
    placed, (first, second), neighbours = _projections(both)
    figure = Figure(figsize=(8.6, 4))
    left, right = figure.subplots(1, 2)
    _scatter(left, placed, count)
    left.set_title("principal components")
    left.set_xlabel(f"{first:.0%} of the variance")
    left.set_ylabel(f"{second:.0%} of the variance")
    _scatter(right, placed if neighbours is None else neighbours, count)
    right.set_title("t-SNE" if neighbours is not None else "one point: t-SNE has nothing to show")
    right.set_xticks([])
    right.set_yticks([])
    left.legend(frameon=False, loc="best")
    return figure


def _projections(rows: Rows) -> tuple[Rows, tuple[float, float], Rows | None]:
    """The rows by their first two principal components, these components' shares of the variance, and t-SNE.

    Where a model has collapsed to one point there is nothing to project, and t-SNE's own code would end the process.
    """
    if rows.std(0).max() <= _ONE_POINT:
        return np.zeros((len(rows), 2)), (0.0, 0.0), None
    rows = np.pad(rows, ((0, 0), (0, max(0, 2 - rows.shape[1]))))
    principal = PCA(2, random_state=0)
    placed = principal.fit_transform(rows)
    first, second = principal.explained_variance_ratio_
    perplexity = min(_PERPLEXITY, max(1, (len(rows) - 1) // 3))
    neighbours = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(rows)
    return placed, (float(first), float(second)), neighbours.astype(np.float64)


def _scatter(axes: Axes, placed: Rows, count: int) -> None:
    images, texts = placed[:count], placed[count:]
    for image, text in zip(images[:_MOST_LINES], texts[:_MOST_LINES], strict=True):
        axes.plot([image[0], text[0]], [image[1], text[1]], color="#999999", linewidth=0.4, zorder=1)
    for name, points, colour in (("images", images, _IMAGE), ("texts", texts, _TEXT)):
        axes.scatter(points[:, 0], points[:, 1], s=6, color=colour, label=name, linewidths=0, alpha=0.8, zorder=2)


def _scores(measured: MeasuredGeometry) -> Figure:
    figure = Figure(figsize=(5, 3))
    axes = figure.subplots()
    for name, colour in (("positive", _IMAGE), ("hardest_negative", _TEXT)):
        counts = np.asarray(measured.scores[name])
        axes.stairs(
            counts,
            np.linspace(-1, 1, len(counts) + 1),
            color=colour,
            label=name.replace("_", " "),
            fill=True,
            alpha=0.5,
        )
    axes.set_xlabel("cosine of an image and a text")
    axes.set_ylabel("images")
    axes.legend(frameon=False)
    return figure


def _spectra(measured: MeasuredGeometry) -> Figure:
    figure = Figure(figsize=(5, 3))
    axes = figure.subplots()
    for name, colour in (("image", _IMAGE), ("text", _TEXT)):
        components = [component for component in measured.spectra[name] if component > 0]
        rank = measured.figures[f"effective_rank_{name}"]
        axes.plot(range(1, len(components) + 1), components, color=colour, label=f"{name}s: effective rank {rank:.1f}")
    axes.set_yscale("log")
    axes.set_xlabel("principal component")
    axes.set_ylabel("share of the variance")
    axes.legend(frameon=False)
    return figure
