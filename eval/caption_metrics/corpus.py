"""Candidate and reference captions of images as words, and their n-grams, counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
from numpy.typing import NDArray

LONGEST = 4
"""BLEU and CIDEr-D compare n-grams of 1 to so many words."""

Integers = NDArray[np.int64]
Words = Sequence[str]


@dataclass(frozen=True, eq=False)
class Counts:
    """How often captions have n-grams of one length; an entry is an n-gram of a caption.

    Entries go by caption, then by n-gram. N-grams are numbered in the order of their words, so that sums over an
    image's n-grams do not depend on the order of images.
    """

    captions: Integers
    grams: Integers
    counts: Integers

    def of_captions(self, first: int, end: int) -> "Counts":
        """The entries of captions `first` to `end`, which count from 0."""
        part = slice(*np.searchsorted(self.captions, [first, end]))
        return Counts(self.captions[part] - first, self.grams[part], self.counts[part])


@dataclass(frozen=True, eq=False)
class Corpus:
    """Words of one candidate and of at least one reference for each image.

    The references of all images lie in one row.
    """

    candidates: Sequence[Words]
    references: Sequence[Sequence[Words]]

    @cached_property
    def reference_images(self) -> Integers:
        """The image of each reference."""
        return np.repeat(np.arange(len(self.references)), [len(references) for references in self.references])

    @cached_property
    def candidate_lengths(self) -> Integers:
        """Words of each candidate."""
        return _lengths(self.candidates)

    @cached_property
    def reference_lengths(self) -> Integers:
        """Words of each reference."""
        return _lengths(self._all_references)

    @cached_property
    def ngrams(self) -> "list[NGrams]":
        """N-grams of 1 to `LONGEST` words."""
        num_candidates, num_references = len(self.candidates), len(self._all_references)
        return [
            NGrams(
                counts.of_captions(0, num_candidates),
                counts.of_captions(num_candidates, num_candidates + num_references),
                self.reference_images,
            )
            for counts in _count_ngrams([*self.candidates, *self._all_references])
        ]

    @cached_property
    def _all_references(self) -> list[Words]:
        return list(chain.from_iterable(self.references))


@dataclass(frozen=True, eq=False)
class NGrams:
    """N-grams of one length in candidates and references."""

    candidates: Counts
    references: Counts
    reference_images: Integers

    @cached_property
    def num_grams(self) -> int:
        """A number above that of every n-gram."""
        return 1 + int(max(self.candidates.grams.max(initial=0), self.references.grams.max(initial=0)))

    @cached_property
    def candidate_keys(self) -> Integers:
        """The image and the n-gram of each entry of the candidates, as one number; ascending."""
        return self.candidates.captions * self.num_grams + self.candidates.grams

    @cached_property
    def reference_keys(self) -> Integers:
        """The image and the n-gram of each entry of the references, as one number."""
        return self.reference_images[self.references.captions] * self.num_grams + self.references.grams


def look_up(keys: Integers, known: Integers, values: Integers) -> Integers:
    """The value of each key; 0 for a key that is not `known`.

    Args:
        keys: what is looked for.
        known: keys that have a value, each once, ascending.
        values: their values.
    """
    if len(known) == 0:
        return np.zeros_like(keys)
    places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[places] == keys, values[places], 0)


def _lengths(captions: Sequence[Words]) -> Integers:
    return np.array([len(caption) for caption in captions], dtype=np.int64)


def _count_ngrams(captions: Sequence[Words]) -> list[Counts]:
    row = list(chain.from_iterable(captions))
    vocabulary = {word: number for number, word in enumerate(sorted(set(row)))}
    tokens = np.array([vocabulary[word] for word in row], dtype=np.int64)
    owners = np.repeat(np.arange(len(captions)), _lengths(captions))
    grams = np.zeros_like(tokens)  # of each place in the row, the n-gram that begins there
    counted = []
    for last in range(LONGEST):  # the n-gram's last word, from its first
        begins = np.flatnonzero(owners[: max(len(row) - last, 0)] == owners[last:])
        _, grams[begins] = np.unique(grams[begins] * len(vocabulary) + tokens[begins + last], return_inverse=True)
        num_grams = 1 + grams[begins].max(initial=0)
        keys, counts = np.unique(owners[begins] * num_grams + grams[begins], return_counts=True)
        counted.append(Counts(keys // num_grams, keys % num_grams, counts))
    return counted
