"""Clusters of embeddings by mini-batch k-means, fitted on some of them and told of all."""

import warnings

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning

FIT_SAMPLES = 1_000_000
_BATCH = 4096
_PASSES = 100
_ROWS = 65_536

Vectors = NDArray[np.floating]


def fit_centres(vectors: Vectors, clusters: int, seed: int, samples: int = FIT_SAMPLES) -> NDArray[np.float32]:
    """The centres [clusters, dim] of at most so many of the vectors, drawn without putting back."""
    draws = np.random.default_rng(seed)
    chosen = np.arange(len(vectors))
    if len(vectors) > samples:
        chosen = np.sort(draws.choice(len(vectors), samples, replace=False))
    means = MiniBatchKMeans(clusters, random_state=seed, batch_size=_BATCH, max_iter=_PASSES, n_init=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct vectors than clusters: some stay empty
        means.fit(np.asarray(vectors[chosen], np.float32))
    centres: NDArray[np.float32] = means.cluster_centers_.astype(np.float32)
    return centres


def nearest_centres(vectors: Vectors, centres: NDArray[np.float32]) -> NDArray[np.int32]:
    """The number of the centre nearest to each vector; of several the first."""
    half = 0.5 * np.einsum("kd,kd->k", centres, centres)
    nearest = np.empty(len(vectors), np.int32)
    for start in range(0, len(vectors), _ROWS):
        rows = np.asarray(vectors[start : start + _ROWS], np.float32)
        nearest[start : start + _ROWS] = np.argmax(rows @ centres.T - half, axis=1)
    return nearest
