"""What a recipe says about its training data."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from vlm.config import Config

Captioning = Literal["first", "random"]


class SourceConfig(Config):
    """One set of shards and its share of the training samples."""

    shards: Annotated[str | tuple[str, ...], Field(description="Tar files: names, {00..03} and * patterns.")]
    weight: Annotated[float, Field(gt=0, description="Share of the samples, relative to the other sources.")] = 1.0

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns as a tuple, also when only one was given."""
        return (self.shards,) if isinstance(self.shards, str) else self.shards


class DataConfig(Config):
    """The training data: sources of webdataset shards, the caption policy, the augmentation and the workers.

    Relative patterns lie below `root` (or the current folder). A source that runs out starts its next epoch; the mix of
    several sources follows their weights. The order of `sources` is part of the order of samples.
    """

    root: str | None = None
    sources: Annotated[dict[str, SourceConfig], Field(min_length=1)]
    caption: Captioning = "random"
    crop_scale: Annotated[
        tuple[float, float], Field(description="Area of the random crop, as shares of the image.")
    ] = (
        0.9,
        1.0,
    )
    flip: bool = False
    workers: Annotated[int, Field(ge=0, description="Loading processes per rank; 0 loads in the training process.")] = 2
    prefetch: Annotated[int, Field(ge=1, description="Batches that each worker holds ready.")] = 2
    cache: Annotated[str | None, Field(description="Folder for unpacked .tar.gz shards.")] = None

    @field_validator("crop_scale")
    @classmethod
    def _is_a_range_of_shares(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError("give two shares of the image, 0 < low <= high <= 1")
        return scale
