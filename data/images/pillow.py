"""What Pillow decodes, as people expect to see it: other formats and colours, transparency, 16 bits, orientation."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from data.bad_sample import BadSampleError

FORMATS = ("JPEG", "PNG", "WEBP")
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
    """Whatever a decoder raises in here, the sample is bad; what it only warns of is not worth a line per image."""
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


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Refuse an image by what its header says, before memory is spent on it.

    Raises:
        BadSampleError: it has more than `max_pixels` pixels.
    """
    if width * height > max_pixels:
        raise BadSampleError(f"its image has {width} x {height} pixels, more than {max_pixels:,}")


def open_image(stored: bytes, max_pixels: int) -> Image.Image:
    """A stored image whose header only is read.

    Raises:
        BadSampleError: it is empty, or has too many pixels.
    """
    if not stored:
        raise BadSampleError("its image is empty (0 bytes)")
    image = Image.open(io.BytesIO(stored), formats=FORMATS)
    check_pixels(image.width, image.height, max_pixels)
    return image


def orientation_of(image: Image.Image) -> int:
    """The image's EXIF orientation; 1 (upright) where it has none that can be read."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata does not spoil the pixels
        return 1
    return orientation if orientation in _UPRIGHT else 1


def rgb(image: Image.Image) -> Image.Image:
    """The decoded image in 8-bit RGB: transparency over white, 16 bits scaled; the first frame of several."""
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64).clip(0, 65_535)
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        colours = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours)
    if image.mode != "RGB":
        image = image.convert("RGB")
    image.load()
    return image


def turned_upright(image: Image.Image, orientation: int) -> Image.Image:
    """The image as its EXIF orientation wants it seen."""
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
