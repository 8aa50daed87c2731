"""What a recipe says about its training data."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from data.captions import CaptionConfig
from data.images.augment import AugmentConfig
from data.shards.cache import CacheConfig
from data.shards.retry import RetryConfig
from vlm.config import Config
from vlm.paths import Named

# "weight": shares by weight, every source repeats. "once": shares by size, so that all sources end an epoch together.
MixName = Literal["weight", "once"]


class SourceConfig(Config):
    """One set of shards, its share of the training samples, and where it differs from the other sources."""

    shards: Annotated[
        str | tuple[str, ...],
        Field(description="Tar files: local names or URLs (s3, gs, hf, https, pipe), {00..03} and * patterns."),
    ]
    weight: Annotated[float, Field(gt=0, description="Share of the samples, relative to the other sources.")] = 1.0
    caption: Annotated[CaptionConfig | None, Field(description="Instead of data.caption.")] = None
    augment: Annotated[AugmentConfig | None, Field(description="Instead of data.augment.")] = None
    num_samples: Annotated[
        int | None, Field(gt=0, description="Samples in the shards; needed, and read, by `mode: sequential` alone.")
    ] = None

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns as a tuple, also when only one was given."""
        return (self.shards,) if isinstance(self.shards, str) else self.shards


class DataConfig(Config):
    """The training data: sources of webdataset shards, their mix and order, captions, augmentation, and loading.

    Relative patterns lie below `root` (or the current folder). The order of `sources` is part of the order of samples.
    """

    root: str | None = None
    sources: Annotated[Named[SourceConfig], Field(min_length=1)]
    mix: Annotated[MixName, Field(description="weight: shares by weight; once: every sample once an epoch.")] = "weight"
    caption: CaptionConfig = CaptionConfig()
    augment: AugmentConfig = AugmentConfig()
    lanes: Annotated[
        int | None,
        Field(gt=0, description="Virtual readers; a divisor of global_batch. null: the largest one up to 1,024."),
    ] = None
    shuffle_shards: Annotated[int, Field(gt=0, description="Shards that are shuffled together, per lane.")] = 8
    workers: Annotated[int, Field(ge=0, description="Loading processes per rank; 0 loads in the training process.")] = 2
    prefetch: Annotated[int, Field(ge=1, description="Batches that each worker holds ready.")] = 2
    patience: Annotated[
        float, Field(gt=0, description="Seconds that a rank waits for a batch before it stops the run.")
    ] = 1800.0
    max_bad_share: Annotated[
        float, Field(ge=0, le=1, description="Share of samples that may be skipped before the run stops.")
    ] = 0.01
    cache: CacheConfig = CacheConfig()
    retry: RetryConfig = RetryConfig()
    mode: Annotated[
        Literal["indexed", "sequential"],
        Field(description="sequential: streams shards without index or copy, without exact resume or elastic order."),
    ] = "indexed"

    @model_validator(mode="after")
    def _mix_and_weights_agree(self) -> "DataConfig":
        weighted = [name for name, source in self.sources.items() if source.weight != 1.0]
        if self.mix == "once" and weighted:
            raise ValueError(f"`mix: once` takes shares from sizes; sources.{weighted[0]}.weight says otherwise")
        return self

    def caption_of(self, source: str) -> CaptionConfig:
        """The caption policy of a source."""
        return self.sources[source].caption or self.caption

    def augment_of(self, source: str) -> AugmentConfig:
        """The augmentation of a source."""
        return self.sources[source].augment or self.augment
