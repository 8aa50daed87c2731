"""Corpus BLEU of captions."""

import math

import numpy as np

from eval.caption_metrics.corpus import Corpus, NGrams, look_up

# coco-caption adds them above and below fractions, so that none is 0 / 0. Where nothing matches, they are the figure.
_TINY, _SMALL = 1e-15, 1e-9


def corpus_bleu(corpus: Corpus) -> list[float]:
    """BLEU-1 to BLEU-4 of the corpus, each in [0, 1].

    With c the words of all candidates, and r those of each image's reference that is nearest in length (of two, the
    shorter one)::

        BLEU-N = min(1, exp(1 - r / c)) * (p_1 * ... * p_N) ** (1 / N)

    where p_n is the share of the candidates' n-grams that references have; an n-gram counts at most as often as in the
    reference of its image that has it most. Sums run over the corpus before they are divided: BLEU is no mean over
    images.

    Source: K. Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation", ACL 2002; smallest
    numbers as in coco-caption.
    """
    num_words, wanted = int(corpus.candidate_lengths.sum()), _nearest_lengths(corpus)
    ratio = (num_words + _TINY) / (wanted + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for n, ngrams in enumerate(corpus.ngrams, start=1):
        product *= (_matches(ngrams) + _TINY) / (int(ngrams.candidates.counts.sum()) + _SMALL)
        scores.append(brevity * product ** (1 / n))
    return scores


def _matches(ngrams: NGrams) -> int:
    keys, places = np.unique(ngrams.reference_keys, return_inverse=True)
    most = np.zeros_like(keys)
    np.maximum.at(most, places, ngrams.references.counts)
    return int(np.minimum(ngrams.candidates.counts, look_up(ngrams.candidate_keys, keys, most)).sum())


def _nearest_lengths(corpus: Corpus) -> int:
    """Words of the references nearest in length, over all images."""
    return sum(
        min((abs(len(reference) - len(candidate)), len(reference)) for reference in references)[1]
        for candidate, references in zip(corpus.candidates, corpus.references, strict=True)
    )
