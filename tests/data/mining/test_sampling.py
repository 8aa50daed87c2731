"""Likeness of texts, nearest vectors and weighted draws, each against a loop or a closed form."""

import functools
import itertools
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from data.mining.nearest import nearest_others
from data.mining.sampling import draw, weights
from data.mining.surface import ngram_overlap, plain, word_edit_likeness
from data.randomness import Draws


def unit(rows: int, dim: int = 6, seed: int = 0) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).normal(size=(rows, dim))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


@pytest.mark.parametrize(("rows", "a_list"), [(150, 4096), (150, 20), (4, 4096)])
def test_nearest_vectors_are_those_of_a_loop(rows: int, a_list: int) -> None:
    """One list, or no more lists than are looked into."""
    vectors = unit(rows)
    found = nearest_others(vectors, 5, a_list=a_list)
    for row in range(rows):
        cosines = [
            (-float(vectors[row].astype(float) @ vectors[other]), other) for other in range(rows) if other != row
        ]
        best = sorted(cosines)[:5]
        assert found.numbers[row].tolist() == [other for _, other in best] + [-1] * (5 - len(best))
        np.testing.assert_allclose(found.cosines[row][: len(best)], [-cosine for cosine, _ in best], atol=1e-6)


def test_of_many_lists_most_nearest_vectors_are_found() -> None:
    vectors = unit(1200, 4)
    found = nearest_others(vectors, 5, a_list=30)
    cosines = vectors @ vectors.T - 2 * np.eye(len(vectors), dtype=np.float32)
    best = np.argsort(-cosines, axis=1)[:, :5]
    recall = np.mean([len(set(mine) & set(true)) / 5 for mine, true in zip(found.numbers, best, strict=True)])
    assert 0.9 < recall < 1


def least_edits(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    @functools.cache
    def least(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(least(i - 1, j) + 1, least(i, j - 1) + 1, least(i - 1, j - 1) + (one[i - 1] != other[j - 1]))

    return least(len(one), len(other))


def test_likeness_of_words_is_the_least_number_of_edits() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        one, other = (tuple(rng.choice(["a", "dog", "bites", "man"], rng.integers(1, 7))) for _ in range(2))
        expected = 1 - least_edits(one, other) / max(len(one), len(other))
        assert word_edit_likeness(" ".join(one), " ".join(other)) == pytest.approx(expected)
    assert word_edit_likeness("", "") == 1


def test_overlap_of_grams_is_that_of_a_hand() -> None:
    assert ngram_overlap("cat", "cats") == 2 * 2 / (3 + 4)  # " ca", "cat" of " ca cat at " and " ca cat ats ts "
    assert ngram_overlap("a", "a") == 1
    assert ngram_overlap("abc", "xyz") == 0
    assert plain(" A  Dog, barking! ") == plain("a dog, barking") == "a dog, barking"


SURFACE, MEANING = [0.9, 0.5, 0.2, 0.7], [0.3, 0.8, 0.9, 0.5]


@pytest.mark.parametrize("side", ["negatives", "paraphrases"])
def test_the_first_is_drawn_in_proportion_to_the_ratio(side: str) -> None:
    ratios = np.asarray(SURFACE) / MEANING if side == "negatives" else np.asarray(MEANING) / SURFACE
    number = 4000
    chances = weights(side, SURFACE, MEANING)  # type: ignore[arg-type]
    first = Counter(draw(chances, 1, Draws("a test", seed))[0] for seed in range(number))
    expected = ratios / ratios.sum()
    for place, share in enumerate(expected):
        assert abs(first[place] / number - share) < 4 * (share * (1 - share) / number) ** 0.5


def test_a_constant_surface_leaves_the_embedding_alone() -> None:
    for constant in (1.0, 0.3):
        chances = np.asarray(weights("negatives", [constant] * 4, MEANING))
        np.testing.assert_allclose(chances / chances.sum(), 1 / np.asarray(MEANING) / (1 / np.asarray(MEANING)).sum())


def test_several_are_drawn_one_after_another_without_putting_back() -> None:
    chances, number = [5.0, 3.0, 1.0], 6000
    pairs = Counter(tuple(draw(chances, 2, Draws("pairs", seed))) for seed in range(number))
    for one, other in itertools.permutations(range(3), 2):
        share = chances[one] / 9 * chances[other] / (9 - chances[one])
        assert abs(pairs[one, other] / number - share) < 4 * (share * (1 - share) / number) ** 0.5
    assert sorted(draw(chances, 5, Draws("all"))) == [0, 1, 2]
