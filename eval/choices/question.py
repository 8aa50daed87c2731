"""Questions: an image, a text that is true of it, and texts that are not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from data.loading.held_out_images import HeldOutImages
from vlm.checkpoint.data_record import DataRecord
from vlm.skip import Skip


class Question(NamedTuple):
    """An image by its number in its set, texts of which the first alone is true of it, and the kind of question."""

    image: int
    texts: tuple[str, ...]
    kind: str = ""


@dataclass(frozen=True)
class Questions:
    """All questions of an evaluation, one at least, and what was found on the way to them.

    Attributes:
        images: the set that the questions' images are numbers of.
        asked: the questions.
        records: the identity of what they are from, by the configuration's keys.
        notices: lines on what is not asked, and why.
        skipped: the entries or samples that should be questions and are none.
        missing: how many have no image.
        crossed: pairs of questions (by number) whose two texts change places with their images (Winoground).
    """

    images: HeldOutImages
    asked: tuple[Question, ...]
    records: Mapping[str, DataRecord]
    notices: tuple[str, ...] = ()
    skipped: tuple[Skip, ...] = ()
    missing: int = 0
    crossed: tuple[tuple[int, int], ...] = ()

    @property
    def all_skipped(self) -> tuple[Skip, ...]:
        """What was of no use so far, as far as this rank knows: entries and images."""
        return (*self.skipped, *self.images.skipped)
