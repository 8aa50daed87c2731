"""Interleaved documents: texts with images between them, as a shard stores them.

A document is a webdataset sample with a json member and images KEY.0.jpg, KEY.1.png, ... Its json has either one `text`
with a mark at the place of each image, or `texts`, a list with null at the place of each; and `images`, the suffixes of
the members in the order of the places ("0.jpg"). A list of images may have nulls where there is text (as OBELICS has).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data.samples.bad_sample import BadSampleError
from data.samples.captions import readable

MOST_PIECES = 10_000
"""So many texts and images of a document are read."""


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
