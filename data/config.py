"""The `data` section of a recipe."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from data.counterfactuals.config import CounterfactualsConfig
from data.documents_config import DocumentsConfig
from data.images.augment import AugmentConfig
from data.images.degrade import DegradedConfig
from data.neighbours.config import NeighboursConfig
from data.samples.captions import CaptionConfig
from data.shards.cache import CacheConfig
from data.shards.retry import RetryConfig
from data.source_shares import USUAL_SHARE, Share, weights_with_shares
from vlm.config import Config
from vlm.paths import Named

# "weight": shares by weight, every source repeats. "once": shares by size, so that all sources end an epoch together.
MixName = Literal["weight", "once"]


class SourceConfig(Config):
    """One set of shards, its share of the training samples, and where it differs from the other sources."""

    shards: Annotated[
        str | tuple[str, ...],
        Field(
            description="Tar files: names or URLs (s3, gs, hf, https; pipe: when sequential), {00..03} and * patterns."
        ),
    ]
    weight: Annotated[
        float, Field(ge=1e-6, le=1e6, description="Share of the samples, relative to the other sources.")
    ] = 1.0
    share: Annotated[
        Share | None,
        Field(
            description="Share of all samples, as a number or 1/32; sources without one have the rest by weight. null: "
            "by weight; 1/32 for a source with counterfactuals of its own beside sources without any."
        ),
    ] = None
    caption: Annotated[CaptionConfig | None, Field(description="Instead of data.caption.")] = None
    augment: Annotated[AugmentConfig | None, Field(description="Instead of data.augment.")] = None
    neighbours: Annotated[
        NeighboursConfig | None, Field(description="Batches of samples that are near each other; null: shuffled ones.")
    ] = None
    counterfactuals: Annotated[
        CounterfactualsConfig | Literal["none"] | None,
        Field(description="Instead of data.counterfactuals; `none`: none are made."),
    ] = None
    num_samples: Annotated[
        int | None,
        Field(gt=0, le=10**12, description="Samples in the shards; needed, and read, by `mode: sequential` alone."),
    ] = None

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns as a tuple, also when only one was given."""
        return (self.shards,) if isinstance(self.shards, str) else self.shards


class DataConfig(Config):
    """The training data: sources of webdataset shards, their mix and order, captions, augmentation, documents, loading.

    Relative patterns lie below `root` (or the current folder). The order of `sources` is part of the order of samples.
    """

    root: Annotated[
        str | None, Field(description="Folder or store of relative patterns; null: the current folder.")
    ] = None
    sources: Annotated[Named[SourceConfig], Field(min_length=1, description="Sets of shards by name, in order.")]
    mix: Annotated[MixName, Field(description="weight: shares by weight; once: every sample once an epoch.")] = "weight"
    caption: Annotated[CaptionConfig, Field(description="Which captions a step reads; sources may differ.")] = (
        CaptionConfig()
    )
    images: Annotated[
        bool,
        Field(
            description="false: none are read or decoded, and samples with a text alone are used too; for objectives "
            "that look at none."
        ),
    ] = True
    augment: Annotated[AugmentConfig, Field(description="What becomes of images; sources may differ.")] = (
        AugmentConfig()
    )
    counterfactuals: Annotated[
        CounterfactualsConfig | None,
        Field(
            description="Captions that are almost right, for terms that tell them from true ones; sources may differ."
        ),
    ] = None
    degraded: Annotated[DegradedConfig | None, Field(description="Degraded copies of some images, beside them.")] = None
    documents: Annotated[
        DocumentsConfig | None, Field(description="Documents of texts and images beside the pairs of each step.")
    ] = None
    lanes: Annotated[
        int | None,
        Field(
            gt=0, le=2**20, description="Virtual readers; a divisor of global_batch. null: the largest one up to 1,024."
        ),
    ] = None
    shuffle_shards: Annotated[
        int, Field(gt=0, le=10**6, description="Shards that are shuffled together, per lane.")
    ] = 8
    workers: Annotated[
        int, Field(ge=0, le=512, description="Loading processes per rank; 0 loads in the training process.")
    ] = 2
    prefetch: Annotated[int, Field(ge=1, le=1024, description="Batches that each worker holds ready.")] = 2
    patience: Annotated[
        float, Field(gt=0, le=30 * 86400, description="Seconds that a rank waits for a batch before it stops the run.")
    ] = 1800.0
    max_bad_share: Annotated[
        float, Field(ge=0, le=1, description="Share of samples that may be skipped before the run stops.")
    ] = 0.01
    cache: Annotated[CacheConfig, Field(description="Copies of remote and gzipped shards on each node.")] = (
        CacheConfig()
    )
    retry: Annotated[RetryConfig, Field(description="How long a store that fails is asked again.")] = RetryConfig()
    mode: Annotated[
        Literal["indexed", "sequential"],
        Field(description="sequential: streams shards without index or copy, without exact resume or elastic order."),
    ] = "indexed"

    @model_validator(mode="after")
    def _mix_and_weights_agree(self) -> "DataConfig":
        said = [
            f"{name}.{'share' if source.share else 'weight'}"
            for name, source in self.sources.items()
            if source.weight != 1.0 or source.share
        ]
        if self.mix == "once" and said:
            raise ValueError(f"`mix: once` takes shares from sizes; sources.{said[0]} says otherwise")
        self.weights(dict.fromkeys(self.sources, 1))
        return self

    @model_validator(mode="after")
    def _neighbours_are_exact(self) -> "DataConfig":
        near = next((name for name, source in self.sources.items() if source.neighbours is not None), None)
        if near is not None and self.mode == "sequential":
            raise ValueError(f"`mode: sequential` streams shards as they are; sources.{near}.neighbours needs indexed")
        if near is not None and self.mix == "once" and len(self.sources) > 1:
            raise ValueError(f"`mix: once` leaves no sample out; sources.{near}.neighbours does, and needs mix: weight")
        return self

    @model_validator(mode="after")
    def _documents_have_images(self) -> "DataConfig":
        if self.documents is not None and not self.images:
            raise ValueError("images: found false; the images of documents are read")
        return self

    @model_validator(mode="after")
    def _documents_are_indexed(self) -> "DataConfig":
        if self.documents is not None and self.mode == "sequential":
            raise ValueError("`mode: sequential` streams pairs alone; documents need mode: indexed")
        return self

    @model_validator(mode="after")
    def _degraded_are_images(self) -> "DataConfig":
        if self.degraded is not None and not self.images:
            raise ValueError("images: found false; there is nothing to be degraded")
        return self

    def weights(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """The weight of each source in the mix, given how many samples it has. Raises ValueError for wrong shares."""
        if self.mix == "once":
            return {name: float(size) for name, size in sizes.items()}
        shares = {name: source.share for name, source in self.sources.items() if source.share is not None}
        edited = {name for name in self.sources if self.counterfactuals_of(name) is not None}
        for name in edited if edited != set(self.sources) else ():
            if not self.sources[name].model_fields_set & {"weight", "share"}:
                shares[name] = USUAL_SHARE
        return weights_with_shares({name: source.weight for name, source in self.sources.items()}, shares)

    def counterfactuals_of(self, source: str) -> CounterfactualsConfig | None:
        """What makes counterfactuals of the captions of a source."""
        own = self.sources[source].counterfactuals
        return None if own == "none" else own or self.counterfactuals

    @property
    def editors(self) -> frozenset[str]:
        """The names of all editors of captions."""
        configs = [self.counterfactuals_of(source) for source in self.sources]
        return frozenset(name for config in configs if config is not None for name in config.editors)

    def caption_of(self, source: str) -> CaptionConfig:
        """The caption policy of a source."""
        return self.sources[source].caption or self.caption

    def augment_of(self, source: str) -> AugmentConfig:
        """The augmentation of a source."""
        return self.sources[source].augment or self.augment
