"""ROUGE-L of captions."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eval.caption_metrics.corpus import Corpus, Words

_BETA = 1.2  # recall counts so many times as much as precision


def rouge_l(corpus: Corpus) -> NDArray[np.float64]:
    """ROUGE-L of each image, in [0, 1].

    With l the words of the longest common subsequence of candidate and reference, P the greatest l / (words of the
    candidate) and R the greatest l / (words of the reference) over the references of the image, not necessarily of one
    and the same::

        ROUGE-L = (1 + beta^2) P R / (R + beta^2 P),   beta = 1.2

    An image without a common word has 0, and so has an empty candidate (1 in coco-caption if a reference is empty too).

    Source: C.-Y. Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004; beta and maxima as in
    coco-caption.
    """
    return np.array(
        [_rouge_l(*image) for image in zip(corpus.candidates, corpus.references, strict=True)], dtype=np.float64
    )


def _rouge_l(candidate: Words, references: Sequence[Words]) -> float:
    common = [(common_subsequence(candidate, reference), len(reference)) for reference in references]
    most = max(length for length, _ in common)
    if most == 0:
        return 0.0
    precision = most / len(candidate)
    recall = max(length / total for length, total in common if total > 0)
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def common_subsequence(first: Words, second: Words) -> int:
    """Words of the longest common subsequence.

    One row of the table of lengths is one integer: bit i is 0 where the length grows from the first i words of `first`
    to the first i + 1. Source: H. Hyyro, "Bit-Parallel LCS-Length Computation Revisited", 2004.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    everywhere = (1 << len(first)) - 1
    row = everywhere
    for word in second:
        here = row & places.get(word, 0)
        row = (row + here | row - here) & everywhere
    return len(first) - row.bit_count()
