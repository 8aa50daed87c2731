"""The image as it goes into a shard: as it is wherever nothing asks for a change."""

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from PIL import Image

from data.images.jpeg import reduction_to
from data.images.picture import Picture
from data.images.pillow import MAX_PIXELS, foreign_bytes, turned_upright

DEFAULT_QUALITY: Final = 95
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_READ = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# A JPEG is decoded at no less than so many times the wanted size before it is resized, which no eye or model can tell.
_OVERSAMPLING = 2


@dataclass(frozen=True)
class StoredImage:
    """An image file for a shard; width and height in pixels, upright, as stored and as they were in the original."""

    suffix: str
    data: bytes
    size: tuple[int, int]
    original_size: tuple[int, int]


def prepare_image(stored: bytes, max_size: int | None, quality: int | None) -> StoredImage:
    """The image with its shorter side at most `max_size` pixels, and at most that JPEG `quality`.

    JPEG, PNG and WebP files are kept byte for byte where they are small enough and `quality` saves nothing: for a JPEG
    of that quality or a lower one, a WebP, or an image with transparency. Anything else that can be read becomes PNG,
    or JPEG where a quality is given. What is written anew is upright, and keeps the colour profile.

    Raises:
        BadSampleError: it cannot be decoded to the end, or has more pixels than Pillow's limit.
    """
    picture = Picture(stored, max_pixels=MAX_PIXELS, formats=_READ)
    original = picture.upright_size
    size = shrunk(original, max_size)
    finer = quality is not None and _is_finer(picture.pillow_image, quality)
    if size == original and picture.format in _SUFFIXES and not finer:
        picture.check()
        return StoredImage(_SUFFIXES[picture.format], stored, original, original)
    written = _SUFFIXES.get(picture.format, "png")
    if finer and (written == "jpg" or not picture.pillow_image.has_transparency_data):
        written = "jpg"
    reduction = reduction_to(*original, _OVERSAMPLING * min(size)) if picture.reducible and size != original else 1
    image = picture.image(reduction)
    with foreign_bytes():
        data = _encode(_resized(image, picture.orientation, size), written, quality or DEFAULT_QUALITY)
    if size == original and picture.format in _SUFFIXES and len(data) >= len(stored):
        return StoredImage(_SUFFIXES[picture.format], stored, original, original)
    return StoredImage(written, data, size, original)


def shrunk(size: tuple[int, int], max_size: int | None) -> tuple[int, int]:
    """(width, height) with the shorter side at most `max_size`, in proportion; never larger."""
    shorter, longer = sorted(size)
    if max_size is None or shorter <= max_size:
        return size
    rest = round(longer * max_size / shorter)
    return (max_size, rest) if size[0] <= size[1] else (rest, max_size)


def _is_finer(image: Image.Image, quality: int) -> bool:
    """Whether JPEG of this quality would store the image more coarsely than it is stored now."""
    if image.format in ("JPEG", "MPO"):
        tables: dict[int, list[int]] = getattr(image, "quantization", {})
        return 0 in tables and sum(tables[0]) < _coarseness(quality)
    return image.format != "WEBP" and not image.has_transparency_data


@lru_cache
def _coarseness(quality: int) -> int:
    """The sum of the luminance table that the encoder uses at this quality."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "JPEG", quality=quality)
    return sum(Image.open(file).quantization[0])  # type: ignore[attr-defined]


def _resized(image: Image.Image, orientation: int, size: tuple[int, int]) -> Image.Image:
    plain = _plain(image)
    profile = image.info.get("icc_profile") if plain.mode == image.mode else None
    plain = turned_upright(plain, orientation)
    if plain.size != size:
        plain = plain.resize(size, Image.Resampling.LANCZOS)
    plain.info = {"icc_profile": profile} if profile else {}
    return plain


def _plain(image: Image.Image) -> Image.Image:
    """The image in a mode that can be resized and stored: grey or RGB, each with or without transparency."""
    if image.mode in ("L", "RGB", "LA", "RGBA"):
        return image
    if image.mode.startswith("I"):  # 16 bits a pixel
        return Image.fromarray((np.asarray(image).clip(0, 0xFFFF) >> 8).astype(np.uint8))
    if image.mode == "1":
        return image.convert("L")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _encode(image: Image.Image, suffix: str, quality: int) -> bytes:
    file = io.BytesIO()
    profile = image.info.get("icc_profile")
    if suffix == "png":
        image.save(file, "PNG", icc_profile=profile)
    elif suffix == "webp":
        image.save(file, "WEBP", quality=quality, icc_profile=profile or b"")
    else:
        image.save(file, "JPEG", quality=quality, icc_profile=profile)
    return file.getvalue()
