"""A picture of how often each answer was given to questions of each right answer."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from vlm.paths import write_output

_DARK = 0.55  # of a row's share, from where on letters are white


def write_confusion(counts: Sequence[Sequence[int]], names: Sequence[str], path: Path) -> Path:
    """Draw counts [right answers, answers] as a PNG, shaded by their share of their row, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = np.asarray(counts, dtype=np.float64)
    shares = table / np.maximum(1, table.sum(1, keepdims=True))
    figure = Figure(figsize=(0.5 * len(names) + 1.4, 0.5 * len(names) + 1.2))
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*table.shape):
        colour = "white" if shares[row, column] > _DARK else "#333333"
        axes.text(column, row, f"{table[row, column]:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(names)), names, fontsize=8, rotation=45)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("answer")
    axes.set_ylabel("right number")
    for side in axes.spines.values():
        side.set_visible(False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150, bbox_inches="tight")
    write_output(path, drawn.getvalue(), "--plots")
    return path
