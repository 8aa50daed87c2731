"""Figures of held-out pairs, and the intervals of their differences between two rows over the choice of pairs.

Pairs are resampled, the same ones for both rows: a resample is how often it takes each pair. Towers, classifiers and
ranks stay as they are; a resample's sums run over different pairs, so that a pair taken twice is no neighbour of
itself.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from benchmarks.objectives.intervals import Interval, interval

RESAMPLES = 1_000
_HELD_OUT = 5

Rows = NDArray[np.float64]
Resampled = NDArray[np.float64]


class PairedClouds(NamedTuple):
    """Unit rows of images and of their texts, [pairs, dim]."""

    image: Rows
    text: Rows


def taken(count: int) -> NDArray[np.float64]:
    """The number of times that each of `count` is taken, [1 + resamples, count]; the first row takes each once."""
    random = np.random.default_rng(0)
    drawn = random.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float64)
    return np.concatenate([np.ones((1, count)), drawn])


def difference(values: list[Resampled], base: list[Resampled]) -> Interval:
    """The mean over seeds of `values` minus that of `base`, each as [1 + resamples], with its interval."""
    apart = np.mean(values, axis=0) - np.mean(base, axis=0)
    return interval(float(apart[0]), apart[1:])


def shares(hits: NDArray[np.float64]) -> Resampled:
    """The mean of the hits of each thing (an image, with all its queries) in each resample."""
    return taken(len(hits)) @ hits / len(hits)


def centroid_gap(pairs: PairedClouds, counts: Rows) -> Resampled:
    """|mean x - mean y|."""
    gap: Resampled = np.linalg.norm(counts @ (pairs.image - pairs.text) / len(pairs.image), axis=1)
    return gap


def alignment(pairs: PairedClouds, counts: Rows) -> Resampled:
    """mean |x_i - y_i|^2."""
    apart: Resampled = counts @ np.square(pairs.image - pairs.text).sum(1) / len(pairs.image)
    return apart


def uniformity(x: Rows, y: Rows, counts: Rows) -> Resampled:
    """log mean exp(-2 |x_i - y_j|^2) over different pairs i, j."""
    potentials = np.exp(4 * (x @ y.T) - 4)
    np.fill_diagonal(potentials, 0)
    total = ((counts @ potentials) * counts).sum(1)
    value: Resampled = np.log(total / (counts.sum(1) ** 2 - np.square(counts).sum(1)))
    return value


def effective_rank(rows: Rows, counts: Rows) -> Resampled:
    """exp of the entropy of the shares of variance."""
    found = []
    for weights in counts / len(rows):
        mean = weights @ rows
        variances = np.linalg.eigvalsh((rows * weights[:, None]).T @ rows - np.outer(mean, mean)).clip(min=0)
        part = variances / variances.sum()
        found.append(np.exp(-(part[part > 0] * np.log(part[part > 0])).sum()))
    return np.array(found)


def separability(pairs: PairedClouds, counts: Rows) -> Resampled:
    """The accuracy of one logistic regression on every fifth pair, in resamples of these."""
    asked = np.arange(len(pairs.image)) % _HELD_OUT == _HELD_OUT - 1
    known = np.concatenate([pairs.image[~asked], pairs.text[~asked]])
    labels = np.repeat([1, 0], (~asked).sum())
    model = LogisticRegression(max_iter=1000).fit(known, labels)
    hits = (model.predict(pairs.image[asked]) == 1) * 0.5 + (model.predict(pairs.text[asked]) == 0) * 0.5
    chosen = counts[:, asked]
    value: Resampled = (chosen @ hits) / chosen.sum(1)
    return value


CLOUD_FIGURES: Mapping[str, Callable[[PairedClouds, Rows], Resampled]] = {
    "centroid gap": centroid_gap,
    "separability": separability,
    "alignment": alignment,
    "uniformity, images": lambda pairs, counts: uniformity(pairs.image, pairs.image, counts),
    "uniformity, texts": lambda pairs, counts: uniformity(pairs.text, pairs.text, counts),
    "uniformity, cross": lambda pairs, counts: uniformity(pairs.image, pairs.text, counts),
    "effective rank, images": lambda pairs, counts: effective_rank(pairs.image, counts),
    "effective rank, texts": lambda pairs, counts: effective_rank(pairs.text, counts),
}


def cloud_figures(pairs: PairedClouds) -> dict[str, Resampled]:
    """All figures of the two clouds, each with its resamples."""
    counts = taken(len(pairs.image))
    return {name: figure(pairs, counts) for name, figure in CLOUD_FIGURES.items()}
