"""Draws among a caption's neighbours by inverse propensity: near on the surface but not in meaning, or the reverse."""

import math
from collections.abc import Sequence
from typing import Final, Literal

from data.randomness import Draws

FLOOR: Final = 0.01
"""Likenesses are no less: what is divided by them stays finite."""

Side = Literal["negatives", "paraphrases"]


def weights(side: Side, surface: Sequence[float], meaning: Sequence[float]) -> list[float]:
    """What each candidate is drawn in proportion to: p_s / p_m for negatives, p_m / p_s for paraphrases (DebCSE)."""
    pairs = [(max(s, FLOOR), max(m, FLOOR)) for s, m in zip(surface, meaning, strict=True)]
    return [s / m if side == "negatives" else m / s for s, m in pairs]


def draw(weights_of_all: Sequence[float], how_many: int, draws: Draws) -> list[int]:
    """Some of the candidates, one after another in proportion to their weights, none twice.

    A candidate's key is -log(u) / weight; the least keys are such a draw (Efraimidis and Spirakis, 2006).
    """
    keys = [-math.log(1 - draws.uniform()) / weight for weight in weights_of_all]
    return sorted(range(len(keys)), key=keys.__getitem__)[:how_many]
