"""The picture of the comparison of geometries."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors.numpy import load_file
from sklearn.decomposition import PCA

from benchmarks.geometry.run import pairs_file
from benchmarks.geometry.tables import GeometryResult

_COLOURS = {
    "clip": "#2f6db5",
    "+ uniformity + alignment": "#c9622b",
    "+ cross uniformity too": "#3c8d5a",
    "+ cyclic": "#8a5cb8",
    "+ cross-correlation": "#b8963c",
    "+ whitening": "#c44d7c",
}
_SHOWN = ("clip, learned", "clip, 0.01", "+ cross uniformity too, learned")


def draw(runs: Sequence[GeometryResult], work: Path, target: Path) -> None:
    """The gap through training, the gap against what the model can do, and the clouds of three rows (seed 0)."""
    with matplotlib.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9.5, 6), layout="constrained")
        axes = figure.subplots(2, 3)
        _on_the_way(axes[0, 0], runs)
        _against(axes[0, 1], runs, "zero-shot top-1, scenes", lambda run: float(np.mean(run.found["named"])))
        _against(axes[0, 2], runs, "R@10 image to text, Flickr8k", _recall)
        for place, row in zip(axes[1], _SHOWN, strict=True):
            _clouds(place, next(run for run in runs if run.run.row == row and run.run.seed == 0), work)
        figure.savefig(target, dpi=130)


def _parts(run: GeometryResult) -> tuple[str, str]:
    name, _, temperature = run.run.row.removeprefix("tuned: ").rpartition(", ")
    return name, temperature


def _on_the_way(axes: Axes, runs: Sequence[GeometryResult]) -> None:
    for run in runs:
        name, temperature = _parts(run)
        if run.run.seed == 0 and run.run.start is None:
            style = "-" if temperature == "learned" else "--"
            axes.plot(*zip(*run.found["gaps"], strict=True), style, color=_COLOURS[name], linewidth=1.2)
    for name, colour in _COLOURS.items():
        axes.plot([], [], color=colour, label=name)
    axes.plot([], [], "--", color="#777777", label="temperature 0.01")
    axes.set_xlabel("samples")
    axes.set_ylabel("centroid gap, Flickr8k")
    axes.set_ylim(0, 3.6)  # room for the legend
    axes.legend(frameon=False, fontsize=7, loc="upper right")


def _against(axes: Axes, runs: Sequence[GeometryResult], label: str, figure: object) -> None:
    assert callable(figure)
    for run in runs:
        name, temperature = _parts(run)
        marker = "s" if run.run.start else ("o" if temperature == "learned" else "x")
        axes.scatter(run.found["gaps"][-1][1], figure(run), color=_COLOURS[name], marker=marker, s=18)
    for marker, said in (("o", "learned temperature"), ("x", "0.01"), ("s", "tuned from clip, 0.01")):
        axes.scatter([], [], color="#777777", marker=marker, s=18, label=said)
    axes.set_xlabel("centroid gap, Flickr8k")
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=7)


def _recall(run: GeometryResult) -> float:
    return float((np.array(run.found["photos"]["image_to_text"]) <= 10).mean())


def _clouds(axes: Axes, run: GeometryResult, work: Path) -> None:
    held = load_file(pairs_file(work, run.key))
    images, texts = held["photos/image"], held["photos/text"]
    placed = PCA(2, random_state=0).fit_transform(np.concatenate([images, texts]))
    for name, points, colour in (
        ("images", placed[: len(images)], "#2f6db5"),
        ("texts", placed[len(images) :], "#c9622b"),
    ):
        axes.scatter(points[:, 0], points[:, 1], s=3, color=colour, label=name, linewidths=0, alpha=0.7)
    axes.set_title(run.run.row)
    axes.set_xlabel("principal components")
    axes.legend(frameon=False, fontsize=7, markerscale=3)
