"""CIDEr-D of captions."""

import numpy as np
from numpy.typing import NDArray

from eval.caption_metrics.corpus import LONGEST, Corpus, NGrams, look_up

_SIGMA = 6.0  # words


def cider_d(corpus: Corpus) -> NDArray[np.float64]:
    """CIDEr-D of each image, in [0, 10].

    For n-grams of n = 1 to 4 words, a caption s is a vector g_n(s): the count of each n-gram times its weight
    log(N / d), where d of the N images have the n-gram in a reference (d = 1 if none has). With l the number of words::

        CIDEr-D(c) = 10 * mean over references s and n of
            exp(-(l(c) - l(s))^2 / (2 sigma^2)) * (min(g_n(c), g_n(s)) . g_n(s)) / (|g_n(c)| |g_n(s)|),   sigma = 6

    and 0 for a fraction without denominator. N-grams that all images have weigh nothing; so a corpus of one image has 0
    whatever its captions, and figures of different sets of images do not compare.

    Source: R. Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015, as coco-caption
    (`pycocoevalcap.cider`) computes it, under the name CIDEr. There an n-gram's count is not divided by the number of
    n-grams in its caption, as it is in the paper. A cosine does not feel that; the clipping does: it compares counts,
    where the paper compares shares. And d is 1 for n-grams of no reference, where the paper would divide by 0.
    """
    num_images = len(corpus.candidates)
    similarity = sum(_cosines(ngrams, num_images) for ngrams in corpus.ngrams) / LONGEST
    images = corpus.reference_images
    apart = corpus.candidate_lengths[images] - corpus.reference_lengths
    penalized = similarity * np.exp(-(apart**2) / (2 * _SIGMA**2))
    return 10 * np.bincount(images, penalized, num_images) / np.bincount(images, minlength=num_images)


def _cosines(ngrams: NGrams, num_images: int) -> NDArray[np.float64]:
    """The clipped cosine of each reference and its image's candidate."""
    candidates, references, images = ngrams.candidates, ngrams.references, ngrams.reference_images
    grams_of_images = np.unique(ngrams.reference_keys) % ngrams.num_grams
    documents = np.bincount(grams_of_images, minlength=ngrams.num_grams)
    weights = np.log(num_images / np.maximum(documents, 1))  # of n-grams of all images 0, without rounding
    reference_vectors = references.counts * weights[references.grams]
    candidate_vectors = candidates.counts * weights[candidates.grams]
    common = look_up(ngrams.reference_keys, ngrams.candidate_keys, candidates.counts) * weights[references.grams]
    products = np.bincount(references.captions, np.minimum(common, reference_vectors) * reference_vectors, len(images))
    candidate_norms = np.sqrt(np.bincount(candidates.captions, candidate_vectors**2, num_images))
    reference_norms = np.sqrt(np.bincount(references.captions, reference_vectors**2, len(images)))
    norms = candidate_norms[images] * reference_norms
    cosines: NDArray[np.float64] = np.divide(products, norms, out=np.zeros(len(images)), where=norms > 0)
    return cosines
