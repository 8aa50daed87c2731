"""ALIGN's rules for noisy image-text pairs, and the order in which they are applied."""

from enum import StrEnum
from typing import Literal

from pydantic import Field, model_validator

from vlm.config import Config

ImageIdentity = Literal["bytes", "url", "picture"]


class Rule(StrEnum):
    """Why a pair is dropped, in the order applied: first what concerns the image, then what concerns the text."""

    UNUSABLE = "unusable"
    MIN_SIDE = "min_side"
    ASPECT_RATIO = "aspect_ratio"
    TEXTS_PER_IMAGE = "texts_per_image"
    TEST_DUPLICATE = "test_duplicate"
    IMAGES_PER_TEXT = "images_per_text"
    RARE_TOKEN = "rare_token"
    LENGTH = "length"


class AlignRules(Config):
    """The limits of "Scaling Up Visual and Vision-Language Representation Learning With Noisy Text Supervision".

    Its rule against pornographic images needs a classifier, and is not here. What `unusable` drops (broken images,
    missing captions) no limit changes. Words are made as `data.filter.words` says.
    """

    min_side: int = Field(default=200, ge=0, le=10**6, description="pixels that the shorter side must exceed")
    max_aspect_ratio: float = Field(default=3.0, gt=1, le=1e6, description="longer / shorter side must be below this")
    max_texts_per_image: int = Field(
        default=1000, ge=1, le=10**9, description="an image with more different texts is dropped"
    )
    max_images_per_text: int = Field(
        default=10, ge=1, le=10**9, description="a text of more different images is dropped"
    )
    max_ngrams: int = Field(
        default=100_000_000,
        ge=1,
        le=10**12,
        description="most frequent unigrams and bigrams (counted together; those as frequent as the last one included) "
        "outside which a text must have none",
    )
    min_ngram_count: int = Field(
        default=1, ge=1, le=10**9, description="a unigram or bigram that occurs fewer times is rare too; for small data"
    )
    min_words: int = Field(default=3, ge=0, le=10**6, description="least unigrams of a text")
    max_words: int = Field(default=20, ge=1, le=10**6, description="most unigrams of a text")
    distance_bits: int = Field(
        default=4, ge=0, le=16, description="bits in which the hashes of a picture and of a test picture may differ"
    )
    image_identity: ImageIdentity = Field(
        default="bytes", description="what makes two images one: equal files, equal json `url`, equal picture hash"
    )
    without: tuple[Rule, ...] = Field(default=(), description="rules that are switched off")

    @model_validator(mode="after")
    def _possible(self) -> "AlignRules":
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} is above max_words {self.max_words}")
        if Rule.UNUSABLE in self.without:
            raise ValueError(f"{Rule.UNUSABLE.value} cannot be switched off: such samples have no image or no text")
        return self
