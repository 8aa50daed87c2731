"""The figures of generated captions against reference captions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval.caption_metrics.bleu import corpus_bleu
from eval.caption_metrics.cider import cider_d
from eval.caption_metrics.corpus import Corpus
from eval.caption_metrics.rouge import rouge_l
from eval.caption_metrics.words import words


@dataclass(frozen=True, eq=False)
class CaptionScores:
    """Figures of candidate captions, as the COCO caption evaluation computes them; higher is better."""

    bleu_1: float
    """In [0, 1], of the whole corpus, as are the other BLEU; see `corpus_bleu`."""
    bleu_2: float
    bleu_3: float
    bleu_4: float
    rouge_l: float
    """In [0, 1], the mean over images; see `rouge.rouge_l`."""
    cider_d: float
    """In [0, 10], the mean over images; see `cider.cider_d`."""
    rouge_l_by_image: NDArray[np.float64]
    cider_d_by_image: NDArray[np.float64]


def score_captions(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Corpus BLEU, ROUGE-L and CIDEr-D of one candidate an image against the image's references.

    The figures do not depend on the order of images. An empty candidate has ROUGE-L and CIDEr-D 0, and makes the
    candidates shorter in BLEU.

    METEOR is not among them: its published figures come of a Java program with its own tables of paraphrases and
    synonyms, and what Python has instead needs WordNet and gives other figures.

    Args:
        candidates: one caption an image.
        references: at least one caption an image, in the same order.

    Raises:
        ValueError: no images, or an image without candidate or reference.
        TypeError: the references of an image are one text.
    """
    _refuse_gaps(candidates, references)
    corpus = Corpus(
        [words(caption) for caption in candidates], [[words(caption) for caption in of] for of in references]
    )
    bleu_1, bleu_2, bleu_3, bleu_4 = corpus_bleu(corpus)
    rouge_l_by_image, cider_d_by_image = rouge_l(corpus), cider_d(corpus)
    return CaptionScores(
        bleu_1=bleu_1,
        bleu_2=bleu_2,
        bleu_3=bleu_3,
        bleu_4=bleu_4,
        rouge_l=_mean(rouge_l_by_image),
        cider_d=_mean(cider_d_by_image),
        rouge_l_by_image=rouge_l_by_image,
        cider_d_by_image=cider_d_by_image,
    )


def _refuse_gaps(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not candidates and not references:
        raise ValueError("no images: there are no candidates and no references")
    if len(candidates) < len(references):
        raise ValueError(
            f"image {len(candidates)} (from 0) has no candidate: {len(candidates)} for {len(references)} images"
        )
    for image in range(len(candidates)):
        if image >= len(references) or not references[image]:
            raise ValueError(f"image {image} (from 0) has no reference")
        if isinstance(references[image], str):
            raise TypeError(f"the references of image {image} (from 0) are one text, not a list of texts")


def _mean(values: NDArray[np.float64]) -> float:
    return math.fsum(values) / len(values)  # exact, so in any order
