"""The editor of numbers: another number in a caption that has exactly one."""

from typing import Annotated

from pydantic import Field, field_validator

from data.counterfactuals.editor import EDITORS, CaptionInSample, Editor
from data.counterfactuals.numbers import WORDS, only_number, with_number
from data.randomness import Draws


@EDITORS.register("number")
class NumberEditor(Editor):
    """Another spelled number from two to ten in place of the caption's only one (Paiss et al., 2023).

    "one", digits and numbers that are part of a name or of another word are left alone; the case is kept.
    """

    by_distance: Annotated[
        tuple[Annotated[float, Field(ge=0, le=1e6)], ...] | None,
        Field(
            min_length=1,
            max_length=len(WORDS) - 1,
            description="Weights of the numbers that are 1, 2, 3, ... away, none of those beyond: near numbers are "
            "harder; null: all alike.",
        ),
    ] = None

    @field_validator("by_distance")
    @classmethod
    def _every_number_has_another(cls, weights: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if weights is not None and not any(weights[: len(WORDS) // 2]):
            raise ValueError("found no weight of a number up to 4 away, and 6 has no others")
        return weights

    def applies(self, caption: CaptionInSample) -> bool:  # noqa: D102
        return only_number(caption.text) is not None

    def edit(self, caption: CaptionInSample, draws: Draws) -> str:  # noqa: D102
        word = only_number(caption.text)
        assert word is not None
        weights = {value: self._weight(abs(value - word.value)) for value in WORDS}
        total = sum(weights.values())
        drawn = draws.weighted({str(value): weight / total for value, weight in weights.items() if weight})
        return with_number(caption.text, word, int(drawn))

    def _weight(self, distance: int) -> float:
        if distance == 0:
            return 0.0
        if self.by_distance is None:
            return 1.0
        return self.by_distance[distance - 1] if distance <= len(self.by_distance) else 0.0
