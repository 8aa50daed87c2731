"""The `data.documents` section of a recipe."""

from typing import Annotated, Literal

from pydantic import Field

from data.images.augment import AugmentConfig
from vlm.config import Config
from vlm.paths import Named


class DocumentSourceConfig(Config):
    """One set of shards of documents, and its share of them."""

    shards: Annotated[
        str | tuple[str, ...],
        Field(description="Tar files: names or URLs (s3, gs, hf, https), {00..03} and * patterns."),
    ]
    weight: Annotated[
        float, Field(ge=1e-6, le=1e6, description="Share of the documents, relative to the other sources.")
    ] = 1.0

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns as a tuple, also when only one was given."""
        return (self.shards,) if isinstance(self.shards, str) else self.shards


class DocumentsConfig(Config):
    """Documents beside the pairs of each step, in an order of their own; the term `interleaved` reads them."""

    sources: Annotated[
        Named[DocumentSourceConfig], Field(min_length=1, description="Sets of shards of documents by name, in order.")
    ]
    per_step: Annotated[int, Field(gt=0, le=10**6, description="Documents in each global batch, beside its pairs.")]
    max_images: Annotated[
        int, Field(gt=0, le=1024, description="Images of a document; it is cut before the next one.")
    ] = 8
    max_tokens: Annotated[
        int | None,
        Field(ge=3, le=10**6, description="Tokens of a document, where it is cut; null: the text tower's context."),
    ] = None
    images_seen: Annotated[
        Literal["last", "all"], Field(description="What a token sees: the last image before it (Flamingo), or all.")
    ] = "last"
    mark: Annotated[str, Field(min_length=1, max_length=100, description="The place of an image in a stored text.")] = (
        "<image>"
    )
    image_text: Annotated[
        str,
        Field(max_length=100, description="Text that a model reads at the place of each image, and is not taught."),
    ] = ""
    augment: Annotated[AugmentConfig | None, Field(description="Instead of data.augment.")] = None
    lanes: Annotated[
        int | None,
        Field(gt=0, le=2**20, description="Virtual readers; a divisor of per_step. null: the largest one up to 1,024."),
    ] = None
