"""JPEG files, the fast way: a cheap look at the header, then decoding at a fraction of the size in the DCT domain."""

import importlib
import io
import logging
import re
from functools import cache
from typing import Any, Literal, NamedTuple

from PIL import Image

from data.images.pillow import Pixels, foreign_bytes, orientation_of
from data.samples.bad_sample import BadSampleError

Reduction = Literal[1, 2, 4, 8]

_log = logging.getLogger(__name__)
_MODES = {"YCbCr": "RGB", "RGB": "RGB", "Gray": "L"}  # what the fast decoder takes, as Pillow calls it
_BALKS = (ValueError, KeyError)  # KeyError: of colours that it has no name for
_START_OF_SCAN = 0xDA
# Frames (baseline, extended, progressive), Huffman and quantisation tables, restart interval, comment: of what is in
# these libjpeg is at least as critical as Pillow, which reads them on its own.
_PLAIN = {0xC0, 0xC1, 0xC2, 0xC4, 0xDB, 0xDD, 0xFE}
# Segments that Pillow looks into and libjpeg does not: marker, how they begin, and the least length that satisfies it
# (including the two bytes of the length itself; None: it depends on more).
_READ_BY_PILLOW: tuple[tuple[int, bytes, int | None], ...] = (
    (0xE0, b"JFIF", 9),
    (0xE1, b"Exif\0", None),
    (0xE1, b"http://ns.adobe.com/xap/", None),
    (0xE2, b"ICC_PROFILE\0", 16),
    (0xE2, b"MPF\0", None),
    (0xED, b"Photoshop 3.0\0", None),
    (0xEE, b"Adobe", 9),
)
# libjpeg's warnings that leave the pixels of a part of the image unknown; it says the first warning of a file only.
_DAMAGE = re.compile(
    "premature end|bad (huffman|arithmetic) code|inconsistent progression|instead of rst"
    "|extraneous bytes before marker 0xd[0-7]",
    re.IGNORECASE,
)


class JpegHeader(NamedTuple):
    """Pixels of the stored image, its EXIF orientation (1 to 8), and its mode as Pillow calls it."""

    width: int
    height: int
    orientation: int
    mode: str


def read_header(stored: bytes) -> JpegHeader | None:
    """The header of a JPEG file; None where it is none that the fast decoder takes (CMYK, for one).

    Raises:
        BadSampleError: Pillow refuses what the header says of the image.
    """
    decoder = fast_decoder()
    if decoder is None or not stored.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colours, _ = decoder.decode_jpeg_header(stored)
    except _BALKS:
        return None
    read_by_pillow = _has_segments_for_pillow(stored)
    if colours not in _MODES or read_by_pillow is None:
        return None
    return JpegHeader(width, height, _orientation(stored) if read_by_pillow else 1, _MODES[colours])


def reduction_to(width: int, height: int, least: int) -> Reduction:
    """The largest of 1, 2, 4 and 8 that leaves at least so many pixels of the shorter side; 1 where none does."""
    most = min(width, height) / least
    reductions: tuple[Reduction, ...] = (8, 4, 2)
    return next((reduction for reduction in reductions if reduction <= most), 1)


def decode(
    stored: bytes, header: JpegHeader, reduction: Reduction, colours: Literal["RGB", "GRAY"] = "RGB"
) -> Pixels | None:
    """The stored image at 1 / `reduction` of its size, [height, width, channels]; None where Pillow shall decide.

    Raises:
        BadSampleError: a part of the data is missing or makes no sense.
    """
    height, width = -(-header.height // reduction), -(-header.width // reduction)
    least = {} if reduction == 1 else {"min_height": height, "min_width": width}
    try:
        pixels: Pixels = fast_decoder().decode_jpeg(stored, colours, **least)
    except _BALKS as error:
        _refuse_damage(str(error))
        return None
    return pixels if pixels.shape[:2] == (height, width) else None


def refuse_damaged(stored: bytes) -> None:
    """Look for damage that Pillow would fill up with grey, at the least cost; nothing where libjpeg cannot read it.

    Raises:
        BadSampleError: a part of the data is missing or makes no sense.
    """
    decoder = fast_decoder()
    if decoder is None:
        return
    try:
        colours = "GRAY" if decoder.decode_jpeg_header(stored, strict=False)[2] in _MODES else "CMYK"
        decoder.decode_jpeg(stored, colours, min_height=1, min_width=1)
    except _BALKS as error:
        _refuse_damage(str(error))


def _refuse_damage(warning: str) -> None:
    """Tell damage from what is merely odd, about which Pillow decides."""
    if _DAMAGE.search(warning):
        raise BadSampleError(f"its image cannot be decoded ({warning})")


@cache
def fast_decoder() -> Any:
    """The module simplejpeg, or None where it is not installed."""
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        _log.warning("simplejpeg is not installed: Pillow decodes JPEG files, at about half the speed")
        return None


def _orientation(stored: bytes) -> int:
    with foreign_bytes():
        image = Image.open(io.BytesIO(stored), formats=("JPEG",))
    return orientation_of(image)


def _has_segments_for_pillow(stored: bytes) -> bool | None:
    """Whether the header has segments that Pillow reads and libjpeg does not; most files of the web have none.

    None where the header is not laid out as usual.
    """
    at, more = 2, False
    while at + 4 <= len(stored) and stored[at] == 0xFF:  # a marker and the length of its segment
        marker, length = stored[at + 1], int.from_bytes(stored[at + 2 : at + 4], "big")
        if marker == _START_OF_SCAN:
            return more
        if 0xE0 <= marker <= 0xEF:
            more = more or _is_read(stored, at, marker, length)
        elif marker not in _PLAIN:
            return None
        at += 2 + length
    return None


def _is_read(stored: bytes, at: int, marker: int, length: int) -> bool:
    return any(
        marker == one and stored.startswith(start, at + 4) and (enough is None or length < enough)
        for one, start, enough in _READ_BY_PILLOW
    )
