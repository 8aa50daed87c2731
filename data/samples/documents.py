"""Interleaved documents: texts with images between them, as a shard stores them.

A document is a webdataset sample with a json member and images KEY.0.jpg, KEY.1.png, ... Its json has either one `text`
with a mark at the place of each image, or `texts`, a list with null at the place of each; and `images`, the suffixes of
the members in the order of the places ("0.jpg"). A list of images may have nulls where there is text (as OBELICS has).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from data.images.augment import AugmentConfig
from data.samples.bad_sample import BadSampleError
from data.samples.captions import readable
from vlm.config import Config
from vlm.paths import Named

MOST_PIECES = 10_000
"""So many texts and images of a document are read."""


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


class ImagePlace(NamedTuple):
    """The place of an image in a document, by the suffix of its member."""

    suffix: str


Piece = str | ImagePlace


def document_pieces(fields: Mapping[str, Any], mark: str) -> tuple[Piece, ...]:
    """The texts and images of a document in the order in which it is read, by its json.

    Raises:
        BadSampleError: it has no text, its places and images do not agree, or it is laid out in another way.
    """
    images = _listed(fields, "images")
    if "texts" in fields:
        texts: Sequence[Any] = _listed(fields, "texts")
        if None in images and [image is None for image in images] != [text is not None for text in texts]:
            raise BadSampleError("its images and texts are not in turn: one of both is null at each place")
    elif isinstance(fields.get("text"), str):
        first, *others = fields["text"].split(mark)
        texts = [first, *(piece for text in others for piece in (None, text))]
    else:
        raise BadSampleError("its json has neither a `text` nor a list of `texts`")
    names = [image for image in images if image is not None]
    places = sum(text is None for text in texts)
    if places != len(names):
        raise BadSampleError(f"its text has {places} places of images, and its json names {len(names)} images")
    pieces = _pieces(texts[:MOST_PIECES], names)
    if not any(isinstance(piece, str) and piece.strip() for piece in pieces):
        raise BadSampleError("it has no text")
    return pieces


def _pieces(texts: Sequence[Any], names: Sequence[Any]) -> tuple[Piece, ...]:
    left = iter(names)
    pieces: list[Piece] = []
    for text in texts:
        value = next(left) if text is None else text
        if not isinstance(value, str):
            raise BadSampleError(f"{'an image' if text is None else 'a text'} of it is no text but {value!r:.40}")
        # A suffix is compared with those of the sample's own members, and is never a path.
        pieces.append(ImagePlace(value.lower()) if text is None else readable(value))
    return tuple(pieces)


def _listed(fields: Mapping[str, Any], name: str) -> list[Any]:
    stored = fields.get(name)
    if not isinstance(stored, list):
        raise BadSampleError(f"its json has no list of `{name}`")
    return stored
