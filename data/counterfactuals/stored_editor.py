"""Wrong captions that come with the data."""

from typing import Annotated

from pydantic import Field

from data.counterfactuals.editor import EDITORS, CaptionInSample, Editor
from data.randomness import Draws
from data.samples.captions import listed


@EDITORS.register("stored")
class StoredNegatives(Editor):
    """One of the wrong captions that a sample's json lists, as NegCLIP's and SugarCrepe's makers write them."""

    field: Annotated[str, Field(min_length=1, description="The json field with one wrong caption, or a list.")] = (
        "negatives"
    )

    def applies(self, caption: CaptionInSample) -> bool:
        """Whether the sample has any. Raises BadSampleError where one is no text."""
        return bool(self._texts(caption))

    def edit(self, caption: CaptionInSample, draws: Draws) -> str:  # noqa: D102
        texts = self._texts(caption)
        return texts[draws.integer(len(texts))]

    def _texts(self, caption: CaptionInSample) -> list[str]:
        return [text for text in (stored.strip() for stored in listed(caption.fields.get(self.field))) if text]
