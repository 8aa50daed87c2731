"""The contract of editors: what makes a caption that is almost right from one that is right."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from data.randomness import Draws
from vlm.config import Config
from vlm.registry import Registry


@dataclass(frozen=True)
class CaptionInSample:
    """A caption that is to be edited, with all captions of its sample and the fields of the sample's json."""

    text: str
    captions: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)


class Editor(Config):
    """A way of making a false caption out of a true one; its fields are its options in a recipe.

    What it returns is compared with what is known of the sample, and drawn again where it is true after all
    (`data.counterfactuals.truth`); an editor looks at the caption's words alone.
    """

    weight: Annotated[
        float, Field(ge=1e-6, le=1e6, description="How often it is chosen among the editors that apply to a caption.")
    ] = 1.0

    @abstractmethod
    def applies(self, caption: CaptionInSample) -> bool:
        """Whether there is anything in the caption that it edits."""

    @abstractmethod
    def edit(self, caption: CaptionInSample, draws: Draws) -> str:
        """One of the edits of a caption that it applies to; other numbers of `draws` give others."""


EDITORS: Registry[type[Editor]] = Registry("editor", Editor)
