"""The image as it goes into a shard: as it is wherever nothing asks for a change."""

import io
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data.bad_sample import BadSampleError

DEFAULT_QUALITY: Final = 95
_KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_READ = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
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
        BadSampleError: it cannot be decoded to the end.
    """
    if not stored:
        raise BadSampleError("its image is empty (0 bytes)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata; what matters is whether the pixels can be decoded
        try:
            return _prepare(stored, max_size, quality)
        except BadSampleError:
            raise
        except UnidentifiedImageError as error:
            raise BadSampleError("its image cannot be decoded (unknown format)") from error
        except Exception as error:  # whatever a decoder raises on foreign bytes, the sample is bad
            raise BadSampleError(f"its image cannot be decoded ({type(error).__name__}: {error})"[:200]) from error


def _prepare(stored: bytes, max_size: int | None, quality: int | None) -> StoredImage:
    image = Image.open(io.BytesIO(stored), formats=_READ)
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        limit = Image.MAX_IMAGE_PIXELS
        raise BadSampleError(f"its image has {image.width} x {image.height} pixels, more than {limit:,}")
    kind = str(image.format)
    sideways = _orientation(image) in _SIDEWAYS
    original = (image.height, image.width) if sideways else image.size
    size = shrunk(original, max_size)
    finer = quality is not None and _is_finer(image, quality)
    if size == original and kind in _KEPT and not finer:
        image.draft(None, (1, 1))  # an eighth of the resolution tells as well whether all of the file is there
        image.load()
        return StoredImage(_KEPT[kind], stored, original, original)
    written = _KEPT.get(kind, "png")
    if finer and (written == "jpg" or not image.has_transparency_data):
        written = "jpg"
    if size != original:
        reach = tuple(side * _OVERSAMPLING for side in (size[::-1] if sideways else size))
        image.draft(None, (reach[0], reach[1]))
    data = _encode(_resized(image, size), written, DEFAULT_QUALITY if quality is None else quality)
    if size == original and kind in _KEPT and len(data) >= len(stored):
        return StoredImage(_KEPT[kind], stored, original, original)
    return StoredImage(written, data, size, original)


def shrunk(size: tuple[int, int], max_size: int | None) -> tuple[int, int]:
    """(width, height) with the shorter side at most `max_size`, in proportion; never larger."""
    shorter, longer = sorted(size)
    if max_size is None or shorter <= max_size:
        return size
    rest = round(longer * max_size / shorter)
    return (max_size, rest) if size[0] <= size[1] else (rest, max_size)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1


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


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    image.load()
    profile = image.info.get("icc_profile")
    plain = _plain(image)
    if profile and plain.mode == image.mode:
        plain.info["icc_profile"] = profile
    if _orientation(image) != 1:
        plain = ImageOps.exif_transpose(plain)
    kept = plain.info.get("icc_profile")
    if plain.size != size:
        plain = plain.resize(size, Image.Resampling.LANCZOS)
    plain.info = {"icc_profile": kept} if kept else {}
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
