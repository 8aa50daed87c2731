"""Negatives and paraphrases of each sample of a corpus, drawn among the captions nearest to its own."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

from data.mining.corpus import Corpus
from data.mining.nearest import Nearest, nearest_others
from data.mining.sampling import Side, draw, weights
from data.mining.surface import SURFACES, SurfaceName
from data.randomness import Draws

_MOST_OWN = 64


@dataclass(frozen=True)
class MiningConfig:
    """How many are drawn for each caption, among how many of its nearest, and by which likeness of surfaces."""

    negatives: int = 3
    paraphrases: int = 0
    candidates: int = 64
    surface: SurfaceName = "ngrams"
    seed: int = 0

    @property
    def counts(self) -> dict[Side, int]:
        """How many of each side."""
        counts: dict[Side, int] = {"negatives": self.negatives, "paraphrases": self.paraphrases}
        return {side: count for side, count in counts.items() if count}


@dataclass(frozen=True)
class Likeness:
    """Some captions, summed up: how many, their cosines and surfaces with what they were found for, their words."""

    count: int = 0
    meaning: float = 0.0
    surface: float = 0.0
    words: int = 0

    def plus(self, other: "Likeness") -> "Likeness":
        """Both together."""
        sums = zip(astuple(self), astuple(other), strict=True)
        return Likeness(*(one + another for one, another in sums))

    @property
    def means(self) -> tuple[float, float, float]:
        """Mean cosine, mean likeness of surfaces, mean number of words."""
        count = max(1, self.count)
        return self.meaning / count, self.surface / count, self.words / count


Mined = dict[Side, list[str]]


class Candidate(NamedTuple):
    """The number of a text near another, and the likeness of both in meaning and on the surface."""

    number: int
    meaning: float
    surface: float


class Miner:
    """Mining in one corpus: the nearest texts of each are found at once."""

    def __init__(self, corpus: Corpus, config: MiningConfig) -> None:
        self.config = config
        self._corpus = corpus
        own = min(corpus.most_captions, _MOST_OWN)
        self._nearest: Nearest = nearest_others(corpus.vectors, config.candidates + max(0, own - 1), seed=config.seed)

    def of_shard(self, shard: int, name: str) -> tuple[dict[int, Mined], dict[str, Likeness]]:
        """What is drawn for each of a shard's samples, by row; and what candidates and drawn captions are like.

        `name` is the shard's in its source, and keys the draws.
        """
        mined, likeness = dict[int, Mined](), dict[str, Likeness]()
        for row, numbers in self._corpus.captions[shard].items():
            near = [self._candidates(number, numbers) for number in dict.fromkeys(numbers)]
            found = self._drawn(near, (name, row))
            for what, captions in (("candidates", [one for some in near for one in some]), *found.items()):
                likeness[what] = likeness.get(what, Likeness()).plus(self._likeness(captions))
            texts = self._corpus.texts
            mined[row] = {side: [texts[n] for n in dict.fromkeys(c.number for c in found[side])] for side in found}
        return mined, likeness

    def _candidates(self, number: int, own: Sequence[int]) -> list[Candidate]:
        """The nearest texts that no caption of the sample says."""
        surface, texts = SURFACES[self.config.surface], self._corpus.plain_texts
        near = zip(self._nearest.numbers[number].tolist(), self._nearest.cosines[number].tolist(), strict=True)
        others = [(other, cosine) for other, cosine in near if other >= 0 and other not in own]
        return [
            Candidate(other, cosine, surface(texts[number], texts[other]))
            for other, cosine in others[: self.config.candidates]
        ]

    def _drawn(self, near: Sequence[Sequence[Candidate]], key: tuple[str, int]) -> dict[Side, list[Candidate]]:
        """What is drawn for each of a sample's captions; what is a paraphrase of one is a negative of none."""
        drawn: dict[Side, list[Candidate]] = {side: [] for side in self.config.counts}
        for side in sorted(drawn, reverse=True):  # paraphrases first
            taken = {one.number for others in drawn.values() for one in others}
            for caption, candidates in enumerate(near):
                left = [one for one in candidates if one.number not in taken]
                chances = weights(side, [one.surface for one in left], [one.meaning for one in left])
                draws = Draws(side, self.config.seed, *key, caption)
                drawn[side] += [left[place] for place in draw(chances, self.config.counts[side], draws)]
        return drawn

    def _likeness(self, captions: Sequence[Candidate]) -> Likeness:
        return Likeness(
            count=len(captions),
            meaning=sum((one.meaning for one in captions), 0.0),
            surface=sum((one.surface for one in captions), 0.0),
            words=sum(len(self._corpus.plain_texts[one.number].split()) for one in captions),
        )
