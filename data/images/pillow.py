"""Decoding by Pillow, as people expect to see it: other formats and colours, transparency, 16 bits, orientation."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from data.samples.bad_sample import BadSampleError

Pixels = NDArray[np.uint8]

MAX_PIXELS = 89_478_485  # from where on Pillow suspects a decompression bomb

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@contextmanager
def foreign_bytes() -> Iterator[None]:
    """For calls of Pillow and nothing else: whatever it raises, the sample is bad; what it warns of is not said."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except BadSampleError:
        raise
    except UnidentifiedImageError as error:
        raise BadSampleError("its image cannot be decoded (unknown format)") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise BadSampleError(f"its image cannot be decoded ({reason:.200})") from error


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of a JPEG, or of an image that is loaded; 1 (upright) where it has none that can be read.

    Of other files that are not loaded it must not be asked: Pillow would look for the metadata behind the pixels, load
    these, and what is wrong with them would be lost in here.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata does not spoil the pixels, and may raise anything
        return 1
    return orientation if isinstance(orientation, int) and orientation in _UPRIGHT else 1


def rgb(image: Image.Image) -> Image.Image:
    """A loaded image in 8-bit RGB: transparency over white, 16 bits scaled; the first frame of several."""
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64).clip(0, 65_535)
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        colours = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours)
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image


def grey(image: Image.Image) -> Image.Image:
    """A loaded image in 8 bits of grey, its transparency disregarded."""
    if image.mode.startswith("I"):  # 16 bits a pixel: convert() would clip at 255
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's warning about transparent palettes
    if image.mode in ("CMYK", "P"):
        image = image.convert("RGB")
    return image.convert("L") if image.mode != "L" else image


def turned_upright(image: Image.Image, orientation: int) -> Image.Image:
    """The image as its EXIF orientation wants it seen."""
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
